"""A pipeline that runs on machines, and what can happen to them: raylets, workers and Ray's actors as processes."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from tests.waiting import WAIT_SECONDS, wait_until


class Job:
    """A pipeline that runs, and what it has said so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            threading.Thread(target=lambda: self.lines.extend(iter(process.stdout.readline, ""))),
            threading.Thread(target=lambda: self.errors.extend(iter(process.stderr.readline, ""))),
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, pattern: str, after: int = 0) -> int:
        """Until a line matches; the index behind it."""
        behind: list[int] = []

        def said() -> bool:
            behind.extend(n + 1 for n, line in enumerate(self.lines) if n >= after and re.search(pattern, line))
            assert behind or self.process.poll() is None, self.said()
            return bool(behind)

        wait_until(said, self.said)
        return behind[0]

    def finish(self) -> None:
        assert self.end() == 0, self.said()

    def end(self) -> int:
        """The exit code; all was said then."""
        code = self.process.wait(WAIT_SECONDS)
        for reader in self._readers:
            reader.join()
        return code

    def step_of(self, pattern: str, after: int = 0) -> int:
        """The step that the first matching line names."""
        (line,) = [line for line in self.lines[after:] if re.search(pattern, line)][:1] or [""]
        match = re.search(r"step=(\d+)/", line)
        assert match, self.said()
        return int(match[1])

    def said(self) -> str:
        return "".join(self.lines + self.errors)


class Machines:
    """A Ray cluster of raylets: a head that only hosts the driver, and machines of one CPU."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self.cluster.address

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    def at_work(self, machines: list[Any]) -> list[Any]:
        """Those that host a worker."""
        return [machine for machine in machines if train_workers(self._raylet(machine))]

    def give_notice(self, machine: Any) -> None:
        """What a cloud says before it takes a machine away."""
        ray = Path(sys.executable).with_name("ray")  # the virtual environment need not be on the PATH
        command = [str(ray), "drain-node", "--address", self.address, "--node-id", machine.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        subprocess.run([*command, "--deadline-remaining-seconds", "600"], check=True, capture_output=True)

    def lose(self, machine: Any) -> None:
        """At once, with all that runs on it."""
        victims = train_workers(self._raylet(machine))
        self.cluster.remove_node(machine, allow_graceful=False)
        for victim in victims:
            if Path(f"/proc/{victim}").exists():
                os.kill(victim, signal.SIGKILL)

    def die(self) -> None:
        """All of Ray at once."""
        for node in self.cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False)

    @contextlib.contextmanager
    def standing_still(self, machine: Any) -> Iterator[None]:
        """No worker of a machine makes a step for the length of a `with`."""
        workers = train_workers(self._raylet(machine))
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        try:
            yield
        finally:
            for worker in workers:
                os.kill(worker, signal.SIGCONT)

    @staticmethod
    def _raylet(machine: Any) -> int:
        return machine.all_processes["raylet"][0].process.pid


def train_workers(parent: int) -> list[int]:
    """Process ids of Ray Train's workers below a process."""
    return [process.pid for process in actors(parent, "RayTrainWorker")]


def actors(parent: int, kind: str) -> list[psutil.Process]:
    """The processes of Ray's actors of a class, below a process."""
    below = psutil.Process(parent).children(recursive=True)
    return [process for process in below if _title(process).startswith(f"ray::{kind}")]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # gone in the meantime
        return ""
