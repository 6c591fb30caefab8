"""Spot machines as the cluster files start and end them, each a host with processes and an address of its own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.infra.hosts import Host, connected_hosts, possible
from tests.infra.metadata_server import give_notice
from tests.infra.test_cluster_files import AUTOSCALER, CLUSTER, pre_stop
from tests.infra.test_hosts import BIN, ask, nodes_alive, start_ray, wait_for
from tests.waiting import WAIT_SECONDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not possible(), reason="no network namespaces here: they need root"),
]

SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}

# A container: processes, Ray's folder and a home of its own. Docker is told to allow what this machine may not.
CONTAINER = """
ulimit() { test "$*" = "-n 65536"; }
mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && mkdir -p /home/ray
printf '%s=%s\\n' RAY_AUTH_MODE "$RAY_AUTH_MODE" RAY_AUTH_TOKEN "$RAY_AUTH_TOKEN" > /home/ray/gmflow.env
"""


@pytest.fixture
def hosts(tmp_path: Path):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    clean |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with connected_hosts(("head", "spot"), tmp_path, clean) as hosts:
        head = hosts["head"]
        start_ray(head, "--head", "--num-cpus=0", "--port=6379", f"--dashboard-host={head.address}", settings=SETTINGS)
        wait_for(lambda: nodes_alive(head, jobs(head)) == 1, "Ray's head", head)
        yield hosts


def jobs(head: Host) -> dict[str, str]:
    return {**SETTINGS, "RAY_API_SERVER_ADDRESS": f"http://{head.address}:8265"}


def in_container(host: Host, head: Host, script: str) -> subprocess.Popen[bytes]:
    command = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-ec")
    # The checkout stands for the image's code, wherever it lies; so nothing may be mounted over /tmp or /home.
    home = f"{host.local}/home"
    return host.start(
        *command,
        (CONTAINER + script).replace("/app/", f"{ROOT}/").replace("/home/ray", home),
        environment={**SETTINGS, "RAY_HEAD_IP": head.address, "TMPDIR": "/tmp", "HOME": home},
    )


def death_reasons(head: Host) -> list[str]:
    nodes = ask(head, jobs(head), "/api/v0/nodes?detail=1").get("data", {}).get("result", {}).get("result", [])
    return [node["state_message"] or "" for node in nodes if node["state"] == "DEAD"]


def test_a_spot_instance_of_the_autoscalers_leaves_and_is_not_joined_again(hosts: dict[str, Host], tmp_path: Path):
    """Its commands, word for word. The metadata service has the address that it has on EC2."""
    head, spot = hosts["head"], hosts["spot"]
    address, notice = "169.254.169.254", tmp_path / "notice.json"
    spot.run("ip", "address", "add", f"{address}/32", "dev", "lo")
    spot.start(sys.executable, "-m", "tests.infra.metadata_server", address, "80", str(notice))
    commands = " && ".join(f"({line})" for line in AUTOSCALER["worker_start_ray_commands"])
    in_container(spot, head, f"{commands} && exec sleep infinity")
    wait_for(lambda: nodes_alive(head, jobs(head)) == 2, "a second node", spot)
    wait_for(lambda: "preemption.py watch" in "".join(spot.processes().values()), "a watch", spot)
    give_notice(notice, 120)
    wait_for(lambda: nodes_alive(head, jobs(head)) == 1, "the node's end", head)
    (reason,) = death_reasons(head)
    assert "EC2 takes this spot instance at" in reason
    again = in_container(spot, head, commands)
    assert again.wait(WAIT_SECONDS) == 2
    assert "no Ray is started on it" in spot.log.read_text()


def test_where_no_ray_is_none_is_started_to_be_told(hosts: dict[str, Host]):
    """Ray's own command would start one, drain it, and be content."""
    alone = in_container(hosts["spot"], hosts["head"], "python /app/pipelines/preemption.py drain --seconds 45")
    assert alone.wait(WAIT_SECONDS) == 1
    assert "error: the notice did not reach Ray: " in hosts["spot"].log.read_text()


def test_a_spot_pod_of_kubernetes_leaves_before_it_is_ended(hosts: dict[str, Host]):
    """Its hook waits until Ray has left the node, and not where it has already; `ray start` goes on meanwhile."""
    head, spot = hosts["head"], hosts["spot"]
    hook = shlex.quote(pre_stop(CLUSTER["spec"]["workerGroupSpecs"][-1]))
    pod = in_container(
        spot,
        head,
        f"ray start --block --address={head.address}:6379 --num-cpus=1 & ray=$!\n"
        "until pidof raylet; do sleep 0.2; done\n"
        f"sh -c {hook} && echo the hook ended\n"
        f"sh -c {hook} && echo the hook ended again\n"
        "kill -0 $ray && echo ray start goes on\n",
    )
    assert pod.wait(WAIT_SECONDS) == 0
    assert re.search(r"the hook ended\n(.*\n)*the hook ended again\nray start goes on\n", spot.log.read_text())
    (reason,) = death_reasons(head)
    assert "this node is being shut down" in reason
