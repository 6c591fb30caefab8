"""Training on hosts with addresses of their own, one of which is cut off from the network on the way."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from datasets_etl.synthetic import write_dataset
from infra.local_stack import seaweedfs
from tests.conftest import ROOT
from tests.infra.conftest import WAIT_SECONDS
from tests.infra.hosts import Host, connected_hosts, possible

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
STEPS = 80


def wait_until(happened, what: str, host: Host) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not happened():
        ended = [process.args for process in host.started if process.poll() is not None]
        assert not ended, f"{ended} ended: {host.log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"{what} did not happen: {host.log.read_text()[-3000:]}"
        time.sleep(0.2)


def start_ray(host: Host, *options: str, settings: dict[str, str]) -> None:
    host.start(
        *(str(BIN / "ray"), "start", "--block", f"--node-ip-address={host.address}", "--disable-usage-stats"),
        *(f"--temp-dir={host.local}/ray", "--object-store-memory=100000000", *options),
        environment=settings,
    )


@pytest.mark.skipif(not possible(), reason="no network namespaces here: they need root")
def test_training_goes_on_when_a_host_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two of three hosts train; one of the two is cut off; the third takes its place. Only S3 is shared."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "RAY_"))}
    clean.pop("PYTHONPATH", None)
    clean |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with connected_hosts(("head", "a", "b", "c"), tmp_path, clean) as hosts:
        head = hosts["head"]
        servers = {
            "AWS_ACCESS_KEY_ID": "tests-key",
            "AWS_SECRET_ACCESS_KEY": "tests-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{head.address}:8333",
        }
        nodes = {
            **servers,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 2,
            # A node that does not answer is given up after some 15 s instead of a minute.
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "4",
        }
        (tmp_path / "s3").mkdir()
        head.start(
            *seaweedfs.command(tmp_path / "s3", 8333, head.address),
            environment=seaweedfs.environment("tests-key", "tests-secret", ("datasets", "training")),
        )
        start_ray(head, "--head", "--num-cpus=0", "--port=6379", f"--dashboard-host={head.address}", settings=nodes)
        jobs = {**nodes, "RAY_API_SERVER_ADDRESS": f"http://{head.address}:8265"}
        wait_until(lambda: nodes_alive(head, jobs) == 1, "Ray's head", head)
        for name in "abc":
            start_ray(hosts[name], f"--address={head.address}:6379", "--num-cpus=1", settings=nodes)
        wait_until(lambda: nodes_alive(head, jobs) == 4, "four nodes", head)

        manifest = shard_on_cluster(tmp_path, head, jobs)
        head.run(
            *job("submit", "--no-wait", "--submission-id=train", "--working-dir", str(ROOT), "--"),
            *curriculum(manifest),
            environment=jobs,
        )

        def log() -> str:
            return head.run(*job("logs", "train"), environment=jobs)

        wait_until(lambda: len(re.findall("step=.* loss=", log())) >= 4, "training", head)
        training = [
            name for name in "abc" if any("RayTrainWorker" in title for title in hosts[name].processes().values())
        ]
        assert len(training) == 2
        before = last_step(log())
        hosts[training[0]].cut_off()
        cut = time.monotonic()
        wait_until(lambda: "resumes: " in log(), "a resume", head)
        resumed = time.monotonic() - cut
        wait_until(lambda: last_step(log().rpartition("resumes: ")[2]) > 0, "a step after the cut", head)
        stepped = time.monotonic() - cut
        assert before < STEPS

        wait_until(lambda: re.search("SUCCEEDED|FAILED|STOPPED", status(head, jobs)), "the end", head)
        said = log()
        assert "SUCCEEDED" in status(head, jobs), said
        assert f"stage=chairs step={STEPS}/{STEPS}" in said
        assert said.count("starts: ") == 1, "it began anew instead of going on from a checkpoint"
        assert last_step(said.partition("resumes: ")[2].partition("\n")[2]) == STEPS
        assert nodes_alive(head, jobs) == 3
        with capsys.disabled():
            print(f"\ncut off at step {before}: resumed after {resumed:.0f} s, next step after {stepped:.0f} s")


def job(*arguments: str) -> list[str]:
    return [str(BIN / "ray"), "job", *arguments]


def status(head: Host, jobs: dict[str, str]) -> str:
    code = "from ray.job_submission import JobSubmissionClient as C; print(C().get_job_status('train'))"
    return head.run(sys.executable, "-c", code, environment=jobs)


def nodes_alive(head: Host, jobs: dict[str, str]) -> int:
    """As the dashboard says; 0 while there is none."""
    code = """
import json, os, urllib.request
headers = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
request = urllib.request.Request(os.environ["RAY_API_SERVER_ADDRESS"] + "/api/v0/nodes", headers=headers)
try:
    answer = json.load(urllib.request.urlopen(request, timeout=5))
    print(sum(node["state"] == "ALIVE" for node in answer["data"]["result"]["result"]))
except OSError:
    print(0)
"""
    return int(head.run(sys.executable, "-c", code, environment=jobs))


def last_step(log: str) -> int:
    """Of the newest progress line; 0 without one."""
    return max((int(step) for step in re.findall(r"step=(\d+)/\d+ rank=0 loss=", log)), default=0)


def shard_on_cluster(tmp_path: Path, head: Host, jobs: dict[str, str]) -> str:
    """Raw files are put on S3 from the head's network; Ray tasks on the other hosts shard them."""
    raw = tmp_path / "raw"
    write_dataset("chairs", raw, pairs=8, held_out=2, height=96, width=128, seed=1)
    code = (
        "import sys, pathlib\nfrom datasets_etl.storage import open_store\n"
        "root, store = pathlib.Path(sys.argv[1]), open_store('s3://datasets/raw')\n"
        "[store.upload(p, p.relative_to(root).as_posix()) for p in root.rglob('*') if p.is_file()]"
    )
    environment = jobs | {"PYTHONPATH": str(ROOT)}
    head.run(sys.executable, "-c", code, str(raw), environment=environment)
    etl = ["python", "pipelines/etl.py", "--dataset", "chairs", "--source", "s3://datasets/raw"]
    log = head.run(
        *job("submit", "--working-dir", str(ROOT), "--", *etl, "--target", "s3://datasets/flow"), environment=jobs
    )
    (url,) = re.findall(r"^s3://datasets/flow/chairs/manifest-[0-9a-f]{16}\.json$", log, re.MULTILINE)
    return url


def curriculum(manifest: str) -> list[str]:
    return [
        *("python", "pipelines/curriculum.py", "--config", "pipelines/configs/demo.yaml", "only=[chairs]"),
        *("storage=s3://training/cut", f"data.chairs={manifest}", "mlflow.tracking_uri=null"),
        *("machine.micro_batch=2", "machine.placement=strict_spread", f"stages.chairs.steps={STEPS}"),
        *("stages.chairs.global_batch=4", "stages.chairs.checkpoint_every=4", "stages.chairs.log_every=2"),
        "stages.chairs.validation=[{data: chairs, subset: val}]",
    ]
