"""Server processes that outlive the command which starts them, and are recognised later by pid and start time."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from infra.local_stack.errors import StackError
from pipelines.same_process import start_time, this_machine

_START_SECONDS = 120
_STOP_SECONDS = 20
_CHILDREN_STOP_SECONDS = 3  # for children that outlive the server
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        command: its program and arguments.
        environment: its whole environment.
        user: the account it runs as; None for the account of this process.
        working_folder: the folder that its relative paths start from.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    working_folder: Path
    user: str | None = None


@dataclass(frozen=True)
class _Identity:
    """A pid may be given to another process later; machine (and boot) and start time tell if it is still the same."""

    pid: int
    machine: str
    started: str

    @classmethod
    def of(cls, pid: int) -> "_Identity":
        return cls(pid, this_machine(), start_time(pid))


class ServerProcess:
    """One server: `NAME.json` records its process, `NAME.log` holds what it prints."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._record = folder / f"{name}.json"

    def find(self) -> psutil.Process | None:
        """The recorded process if it still runs."""
        known = self._known()
        process = None if known is None else _process(known.pid)
        if known is None or process is None or _Identity.of(known.pid) != known:
            return None
        return process

    def _known(self) -> _Identity | None:
        try:
            return _Identity(**json.loads(self._record.read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # there is none, or it is cut short or another version's
            return None

    def start(self, launch: Launch, ready: Callable[[], object]) -> None:
        """Start the server. Returns once `ready` returns without an exception.

        Raises StackError with the last line of the log if the server ends before that or takes too long.
        """
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                list(launch.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(launch.environment),
                cwd=launch.working_folder,
                start_new_session=True,  # an interrupted terminal does not end it
                user=launch.user,
                group=launch.user,
                extra_groups=None if launch.user is None else [],
            )
        self._record.write_text(json.dumps(asdict(_Identity.of(process.pid))))
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                ready()
            except Exception as error:  # whatever a client of a server that is not up yet raises
                ended = process.poll() is not None
                if not ended and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                    continue
                self.stop()
                how = (
                    f"ended with {process.returncode}" if ended else f"is not ready after {_START_SECONDS} s ({error})"
                )
                raise StackError(f"{self.name}: {how}: {self._last_line()}; see {self.log}") from error
            return

    def stop(self) -> bool:
        """End the server, if it is alive, and every process it started. Returns whether there was anything to end."""
        known, process = self._known(), self.find()
        if known is None:
            return False
        orphans = _session(known.pid) if process is not None or _process(known.pid) is None else []
        children = {*orphans, *(process.children(recursive=True) if process is not None else [])} - {process}
        for family, patience in (([process] if process else [], _STOP_SECONDS), (children, _CHILDREN_STOP_SECONDS)):
            _signal(family, psutil.Process.terminate)
            _, left = psutil.wait_procs(family, timeout=patience)
            _signal(left, psutil.Process.kill)
            psutil.wait_procs(left, timeout=_STOP_SECONDS)
        self._record.unlink(missing_ok=True)
        return process is not None or bool(children)

    def _last_line(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"


def _process(pid: int) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def _session(leader: int) -> list[psutil.Process]:
    """Processes of a session. The session's number is given to no other process while one of them lives."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def _signal(processes: Iterable[psutil.Process], send: Callable[[psutil.Process], None]) -> None:
    """Signal processes. psutil does not signal another process that has got the pid since."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            send(process)


@contextlib.contextmanager
def undone_on_failure(processes: list[ServerProcess]) -> Iterator[None]:
    """If the block fails, stop the processes that it put into the list, the last one first."""
    try:
        yield
    except BaseException:
        for process in reversed(processes):
            process.stop()
        raise
