"""`python -m infra.local_stack up | status | env | down`."""

import argparse
import contextlib
import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.local_stack.errors import StackError
from infra.local_stack.processes import ServerProcess, undone_on_failure
from infra.local_stack.services import Service, ray_folder, require_postgresql, services
from infra.local_stack.settings import Settings, Stack, require_free
from pipelines.arguments import Parser
from pipelines.entry import command_for

_DEFAULT_FOLDER = Path("runs/stack")

console = Console(stderr=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m infra.local_stack", description="Real servers without containers.")
    tasks = parser.add_subparsers(dest="task", required=True)
    up = tasks.add_parser("up", help="start what does not run yet, and show health")
    status = tasks.add_parser("status", help="show health; exit code 1 unless all is healthy")
    env = tasks.add_parser("env", help="print the shell lines that set addresses and credentials")
    down = tasks.add_parser("down", help="stop everything `up` started, and nothing else")
    for task in (up, status, env, down):
        task.add_argument("--dir", type=Path, default=_DEFAULT_FOLDER, help="the stack's folder (default: %(default)s)")
    default = Settings()
    up.add_argument("--database", choices=("sqlite", "postgresql"), help=f"of MLflow (default: {default.database})")
    for name in ("s3_port", "mlflow_port", "postgres_port", "ray_port", "dashboard_port", "workers", "cpus_per_worker"):
        option = f"--{name.replace('_', '-')}"
        up.add_argument(option, type=int, help=f"default: {getattr(default, name)}")
    down.add_argument("--wipe", action="store_true", help="forget data, runs, credentials and settings too")
    return parser.parse_args(argv)


def up(folder: Path, given: dict[str, Any]) -> int:
    """Start the servers that do not run. Options given now are kept for the next `up`. Returns the exit code."""
    before = Stack.load(folder) or Stack.create(folder)
    stack = before.changed(given)
    with _alone(stack.folder):
        running = [each.name for each in services(before) if each.process(before).find() is not None]
        if running and stack.settings != before.settings:
            raise StackError(f"{', '.join(running)} run with other settings; `down` first")
        if stack.settings.database == "postgresql":
            require_postgresql(stack.folder)
        stack.save()
        missing = [each for each in services(stack) if each.process(stack).find() is None]
        for service in missing:
            service.process(stack).stop()  # a server that was killed may have left processes behind
            for port, option in service.ports.items():
                require_free(port, service.name, option)
        started: list[ServerProcess] = []
        with undone_on_failure(started):
            for service in missing:
                started.append(service.process(stack))
                _start(service, stack)
    healthy = show(stack)
    if healthy:
        print(f"addresses and credentials: . {_shown(stack.environment_file)}")
        print(f"Ray: {stack.dashboard_url}, token in {_shown(stack.token_file)}")
        print(f"MLflow: {stack.mlflow_url}, user admin, password in {_shown(stack.environment_file)}")
    return 0 if healthy else 1


def _start(service: Service, stack: Stack) -> None:
    began = time.monotonic()
    with console.status(f"starting {service.name}"):
        service.process(stack).start(service.launch(), service.probe)
    console.print(f"started {service.name} in {time.monotonic() - began:.1f} s", highlight=False)


def show(stack: Stack) -> bool:
    """Print the table of health. Returns whether all servers are healthy."""
    table = Table(title=f"local stack in {_shown(stack.folder)}", title_justify="left")
    for name in ("server", "health", "address", "pid", "up for", "what it says"):
        table.add_column(name, justify="right" if name in ("pid", "up for") else "left", overflow="fold")
    healthy = True
    for service in services(stack):
        process = service.process(stack).find()
        try:
            said, state = service.probe(), "healthy"
        except Exception as error:  # noqa: BLE001 (any error of a broken server's client is shown)
            said, state = " ".join(str(error).split()), "down" if process is None else "not well"
        if process is None and state == "healthy":
            said, state = f"another server, or what is left of a killed one, answers ({said})", "down"
        healthy &= state == "healthy"
        table.add_row(
            service.name,
            Text(state, style="green" if state == "healthy" else "red"),
            service.address,
            "" if process is None else str(process.pid),
            "" if process is None else _duration(time.time() - process.create_time()),
            Text(said),
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    return healthy


def down(folder: Path, *, wipe: bool) -> int:
    stack = Stack.load(folder)
    if stack is None:
        print(f"no stack in {_shown(folder)}: nothing to stop")
        return 0
    with _alone(stack.folder):
        for service in reversed(services(stack)):
            process = service.process(stack)
            found = process.find()
            ended = process.stop()
            print(f"{service.name}: " + (f"stopped (pid {found.pid})" if ended and found else "was not running"))
        if wipe:
            shutil.rmtree(ray_folder(stack), ignore_errors=True)
            shutil.rmtree(stack.folder)
            print(f"wiped {_shown(stack.folder)}")
        else:
            print(f"data, runs and settings stay in {_shown(stack.folder)}: up goes on with them, down --wipe forgets")
    return 0


def _existing(folder: Path) -> Stack:
    stack = Stack.load(folder)
    if stack is None:
        raise StackError(f"no stack in {_shown(folder)}; start one with python -m infra.local_stack up")
    return stack


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the stack's lock, because two `up` at the same time would start everything twice."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"{_shown(folder)}: another up or down is at work there; wait for it") from None
        yield


def _shown(path: Path) -> str:
    """The path, relative if it is below the working directory."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


@command_for(StackError)
def main() -> None:
    sys.exit(run(parse_arguments()))


def run(arguments: argparse.Namespace) -> int:
    """Run a task. Returns the exit code."""
    if arguments.task == "up":
        names = {field.name for field in fields(Settings)}
        given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
        return up(arguments.dir, given)
    if arguments.task == "down":
        return down(arguments.dir, wipe=arguments.wipe)
    stack = _existing(arguments.dir)
    if arguments.task == "env":
        print(stack.environment_file.read_text(), end="")
        return 0
    return 0 if show(stack) else 1


if __name__ == "__main__":
    main()
