"""A cloud's notice reaches Ray: from EC2's metadata service, played by a small server, and from a hook.

As a worker of the autoscaler's does it, on a host of its own: tests/infra/test_spot.py.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from ray.core.generated.common_pb2 import NodeDeathInfo

from pipelines import preemption
from pipelines.cluster import free_port
from tests.conftest import ROOT
from tests.infra.metadata_server import MetadataServer, give_notice
from tests.pipelines.conftest import Call
from tests.waiting import WAIT_SECONDS, output_of, wait_until

SCRIPT = str(ROOT / "pipelines/preemption.py")
ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
HEAVY = ("torch", "ray", "mlflow", "numpy")


class Metadata:
    """A metadata server that runs, in a thread."""

    def __init__(self, notice: Path, port: int = 0) -> None:
        self.notice = notice
        self.server = MetadataServer("127.0.0.1", port, notice)
        self.port = self.server.server_port
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def give_notice(self, seconds: float) -> None:
        give_notice(self.notice, seconds)

    def wait_for_questions(self, more: int) -> None:
        enough = self.server.asked + more
        wait_until(lambda: self.server.asked >= enough)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    metadata = Metadata(tmp_path / "notice.json")
    monkeypatch.setenv(ENDPOINT, f"http://127.0.0.1:{metadata.port}/")
    monkeypatch.setattr(preemption, "_POLL_S", 0.02)
    yield metadata
    metadata.close()


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seconds that Ray was told."""
    told: list[int] = []
    monkeypatch.setattr(preemption, "drain", lambda seconds, _: told.append(seconds))
    return told


class Watching:
    """`watch` in a thread."""

    def __init__(self) -> None:
        self._thread = threading.Thread(target=preemption.watch)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


def test_the_notice_is_passed_on_once_with_the_time_that_is_left(metadata: Metadata, drained: list[int]):
    watching = Watching()
    metadata.wait_for_questions(3)
    assert watching.is_alive()
    assert drained == []
    metadata.give_notice(120)
    watching.wait()
    (seconds,) = drained
    assert 100 <= seconds <= 120


def test_a_time_that_has_passed_leaves_none(metadata: Metadata, drained: list[int]):
    metadata.give_notice(-30)
    preemption.watch()
    assert drained == [0]


@pytest.mark.parametrize("said", ["", "{}", "[]", "null", '{"time": "soon"}', '{"time": 7}'])
def test_what_makes_no_sense_is_no_notice(metadata: Metadata, drained: list[int], said: str):
    metadata.notice.write_text(said)
    watching = Watching()
    metadata.wait_for_questions(3)
    assert watching.is_alive()
    assert drained == []
    metadata.give_notice(60)
    watching.wait()
    assert len(drained) == 1


def test_a_metadata_service_that_is_away_is_asked_again(
    metadata: Metadata, drained: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preemption, "_STARTING_S", 0.1)  # counts before it was reached, not after
    watching = Watching()
    metadata.wait_for_questions(1)
    metadata.server.broken = True
    metadata.wait_for_questions(10)
    metadata.close()
    time.sleep(0.3)
    assert watching.is_alive()
    back = Metadata(metadata.notice, metadata.port)
    try:
        back.give_notice(60)
        watching.wait()
    finally:
        back.close()
    assert len(drained) == 1
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "HTTP Error 503" in line]) == 1, "it is told once, not every few seconds"


def test_ray_that_is_away_is_told_again(metadata: Metadata, monkeypatch: pytest.MonkeyPatch):
    tries = []

    def refuse_twice(seconds: int, why: str) -> None:
        tries.append(seconds)
        if len(tries) < 3:
            raise preemption.PipelineError("no Ray")

    monkeypatch.setattr(preemption, "drain", refuse_twice)
    metadata.give_notice(60)
    preemption.watch()
    assert len(tries) == 3


def test_no_proxy_is_asked_for_what_is_on_the_machine(metadata: Metadata):
    metadata.give_notice(60)
    environment = {**os.environ, "http_proxy": f"http://127.0.0.1:{free_port()}", "no_proxy": ""}
    checked = subprocess.run(
        [sys.executable, SCRIPT, "check"], env=environment, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stderr.count("no Ray is started")) == (2, 1)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:{closed}", "http://127.0.0.1:{other}", "nonsense"])
def test_on_another_machine_than_ec2s_it_ends_with_a_line(
    call: Call, endpoint: str, drained: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Nobody is there, or a server that knows nothing of tokens, or the address is none."""
    monkeypatch.setattr(preemption, "_STARTING_S", 0.1)
    monkeypatch.setattr(preemption, "_POLL_S", 0.02)
    other = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        monkeypatch.setenv(ENDPOINT, endpoint.format(closed=free_port(), other=other.server_port))
        code, _, said = call(preemption, "watch")
    finally:
        other.shutdown()
        other.server_close()
        thread.join()
    assert code == 2
    assert said.splitlines()[-1].startswith("error: ")
    assert said.endswith("is this an EC2 machine?\n")


def test_no_ray_is_started_on_a_machine_that_is_taken(metadata: Metadata, call: Call):
    assert call(preemption, "check") == (0, "", "")
    metadata.give_notice(60)
    code, _, said = call(preemption, "check")
    assert code == 2
    assert re.fullmatch(r"error: EC2 takes this spot instance at \d\d:\d\d:\d\d UTC: no Ray is started on it\n", said)
    metadata.server.broken = True
    assert call(preemption, "check")[0] == 0, "no reason to do without a machine"


def test_it_starts_at_once():
    """A pod that GKE takes has some 15 s, and torch alone would take as long on a machine at work."""
    code = f"import sys, pipelines.preemption; print([name for name in {HEAVY} if name in sys.modules])"
    started = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert started.stdout == "[]\n"


@pytest.mark.parametrize("arguments", [[], ["drain"], ["drain", "--seconds", "0"], ["leave"]])
def test_wrong_usage(call: Call, arguments: list[str]):
    code, _, said = call(preemption, *arguments)
    assert code == 2
    assert said.startswith("error: ")
    assert "--help shows what there is" in said


def test_without_ray_a_drain_ends_with_a_line(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setattr(preemption, "_RAY_ANSWERS_S", 2)
    assert call(preemption, "drain", "--seconds", 45) == (
        1,
        "",
        "error: the notice did not reach Ray: no answer within 2 s\n",
    )


# Holds the node's only CPU until it is ended.
WORK = """
import ray, time

@ray.remote(num_cpus=1)
class Worker:
    def ready(self):
        return "ready"

ray.init()
worker = Worker.remote()
print(ray.get(worker.ready.remote()), flush=True)
time.sleep(3600)
"""


class Machine:
    """A Ray of one node. Of several on one machine Ray's commands would take the head."""

    def __init__(self, folder: str) -> None:
        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Python with arguments, beside that Ray."""
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, "RAY_ADDRESS": self.cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def start_work(self) -> subprocess.Popen[str]:
        work = self.start("-c", WORK)
        assert "ready" in iter(lambda: work.stdout.readline().strip(), "")
        return work

    @property
    def deadline(self) -> float | None:
        """Until when Ray believes to have the node; None while it knows of no end."""
        assert self._node["Alive"]
        return self.cluster.global_state.get_draining_nodes().get(self._node["NodeID"])

    @property
    def death_reason(self) -> str | None:
        return None if self._node["Alive"] else NodeDeathInfo.Reason.Name(self._node["DeathReason"])

    @property
    def _node(self) -> dict[str, Any]:
        (node,) = self.cluster.global_state.node_table()
        return node

    def shut_down(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()
        self.cluster.shutdown()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="gmflow-") as folder:  # short: Ray keeps sockets in it
        machine = Machine(folder)
        try:
            yield machine
        finally:
            machine.shut_down()


@pytest.mark.slow
def test_ec2s_notice_drains_the_node_of_a_real_ray(machine: Machine, metadata: Metadata):
    """Ray gives the node no new work and an end; once the work has left, the node does."""
    work = machine.start_work()
    watch = machine.start(SCRIPT, "watch")
    metadata.wait_for_questions(1)
    assert machine.deadline is None
    metadata.give_notice(120)
    said, errors = output_of(watch)
    assert (watch.returncode, errors) == (0, "")
    assert re.fullmatch(r"told Ray that this machine is taken in \d+ s\n", said)
    assert time.time() < machine.deadline / 1000 < time.time() + 120
    assert work.poll() is None, "who works there leaves by himself"
    work.terminate()
    wait_until(lambda: machine.death_reason == "AUTOSCALER_DRAIN_PREEMPTED")


@pytest.mark.slow
def test_a_hook_drains_the_node_of_a_real_ray(machine: Machine):
    machine.start_work()
    drain = machine.start(SCRIPT, "drain", "--seconds", "45")
    assert (*output_of(drain), drain.returncode) == ("", "", 0)
    assert time.time() < machine.deadline / 1000 < time.time() + 45
