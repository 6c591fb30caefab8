"""Being connected to Ray: how it begins, and how it ends."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError

from pipelines import cluster
from pipelines.cluster import connected, free_port, talk_where_ray_does
from pipelines.errors import OutageError
from tests.conftest import ROOT
from tests.waiting import output_of

SCRIPT = """
import time
from pipelines.cluster import connected
from pipelines.errors import resumable_command

@resumable_command
def main():
    with connected():
        print("connected", flush=True)
        while True:  # in short: one that comes just before a sleep begins is handled behind it
            time.sleep(0.1)

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_who_is_told_to_end_ends_with_a_line(told: signal.Signals):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "connected\n", process.communicate()
    process.send_signal(told)
    _, errors = output_of(process)
    assert (process.returncode, errors) == (130, "interrupted; the same command goes on from here\n")


DYING = """
import os, time
from pipelines.cluster import connected
import ray
from pipelines.errors import command

@ray.remote(max_retries=1)
def task():
    {body}

@command
def main():
    with connected():
        ray.get(task.remote(), timeout=60)

main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "settings", "told"),
    [
        (
            "os._exit(7)",
            {},
            "the process of a Ray task died each time it was tried, .*; Ray's logs on its node say more",
        ),
        (
            "time.sleep(50)",
            {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100", "RAY_task_oom_retries": "1"},
            r"Ray killed a task each time it was tried, because node 127\.0\.0\.1 \(\S+GB of \S+GB in use\) ran out of",
        ),
    ],
    ids=["dies", "is killed for memory"],
)
def test_a_task_that_always_dies_is_said_in_a_line(body: str, settings: dict[str, str], told: str):
    """By itself Ray would try one that it kills for memory without end."""
    process = subprocess.Popen(
        [sys.executable, "-c", DYING.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **settings},
    )
    _, errors = output_of(process)
    assert process.returncode == 1, errors
    assert re.fullmatch(f"error: {told}.*\n", errors), errors


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had none yet; starting one does nothing."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **how: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


@pytest.mark.usefixtures("no_ray")
def test_a_ray_that_is_lost_is_said_in_a_line():
    lost = r"Ray was lost \(The actor died.*\); give the same command again"
    with pytest.raises(OutageError, match=lost), connected():
        raise ActorDiedError
    made = RayTaskError("__init__", "Traceback …\nOSError: [Errno 28] No space left on device", OSError(28, "No space"))
    full = r"^Ray was lost \(OSError: \[Errno 28\] No space left on device\); give"
    with pytest.raises(OutageError, match=full), connected():
        raise ActorDiedError(made)
    with pytest.raises(RayTaskError), connected():
        raise RayTaskError("f", "Traceback", ValueError("a bug"))


@pytest.mark.usefixtures("no_ray")
def test_a_ray_that_is_not_there_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch):
    def fail(**how: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify …")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(OutageError) as told:
        connected().__enter__()
    assert str(told.value) == "no Ray: the cluster at auto does not answer (Could not find any running Ray instance.)"
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(OutageError, match=re.escape("no Ray: it does not start here")):
        connected().__enter__()


@pytest.mark.usefixtures("no_ray")
def test_a_head_that_takes_no_connections_is_waited_for_a_while(monkeypatch: pytest.MonkeyPatch):
    """Ray would try for more than ten minutes."""
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster, "_HEAD_PATIENCE_S", 1.5)
    naps = []
    monkeypatch.setattr(cluster.time, "sleep", naps.append)
    monkeypatch.setattr(cluster.time, "monotonic", lambda: float(len(naps)))
    refused = rf"no Ray: the cluster at {address} does not answer \(\[Errno 111\] Connection refused\)"
    with pytest.raises(OutageError, match=refused):
        connected().__enter__()
    assert len(naps) == 2
    begun: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **how: begun.append(how))

    with contextlib.ExitStack() as heads:

        def start(_: float) -> None:
            host, _, port = address.partition(":")
            heads.enter_context(socket.create_server((host, int(port))))

        monkeypatch.setattr(cluster.time, "sleep", start)
        with connected():
            assert len(begun) == 1


@pytest.mark.parametrize("chosen", [{}, {"NCCL_SOCKET_IFNAME": "ib"}])
def test_workers_talk_by_the_interface_that_ray_uses(monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]):
    """By itself, NCCL takes the first that is up, be it a bridge; gloo, whatever the host's name leads to."""
    monkeypatch.setattr(os, "environ", dict(chosen))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    talk_where_ray_does()
    assert os.environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"} | chosen
