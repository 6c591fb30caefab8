"""Training on hosts with addresses of their own, one of which is cut off from the network on the way."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from datasets_etl.manifest import build
from datasets_etl.shards import plan_shards, write_shard
from datasets_etl.sources import SOURCES, SourceTree
from datasets_etl.storage import open_store
from datasets_etl.synthetic import write_dataset
from infra.local_stack import seaweedfs
from pipelines.config_file import load_config
from pipelines.curriculum import run_curriculum
from pipelines.training.config import CurriculumConfig
from tests.conftest import ROOT
from tests.infra.hosts import Host, connected_hosts, possible
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
STEPS = 30


def wait_for(happened: Callable[[], object], what: str, host: Host) -> None:
    def check() -> bool:
        ended = [process.args for process in host.started if process.poll() is not None]
        assert not ended, f"{ended} ended: {host.log.read_text()[-3000:]}"
        return bool(happened())

    # To ask a host is to start a process on it.
    wait_until(check, lambda: f"{what}: {host.log.read_text()[-3000:]}", every_s=1)


def start_ray(host: Host, *options: str, settings: dict[str, str]) -> None:
    host.start(
        *(str(BIN / "ray"), "start", "--block", f"--node-ip-address={host.address}", "--disable-usage-stats"),
        *(f"--temp-dir={host.local}/ray", "--object-store-memory=100000000", *options),
        environment=settings,
    )


@pytest.mark.skipif(not possible(), reason="no network namespaces here: they need root")
def test_training_goes_on_when_a_host_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str], local_ray: None):
    """Two of three hosts train; one of the two is cut off; the third takes its place.

    Only S3 is shared: temporary folders and shared memory are each host's own, and so is its name, which leads to
    loopback as on a stock Debian. The weights are those of an undisturbed run on one machine, bit for bit.
    """
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
        wait_for(lambda: nodes_alive(head, jobs) == 1, "Ray's head", head)
        for name in "abc":
            start_ray(hosts[name], f"--address={head.address}:6379", "--num-cpus=1", settings=nodes)
        wait_for(lambda: nodes_alive(head, jobs) == 4, "four nodes", head)

        local_manifest = make_dataset(tmp_path)
        manifest = put_on_s3(local_manifest, head, jobs)
        submit = (str(BIN / "ray"), "job", "submit", "--no-wait", "--submission-id=train", "--working-dir", str(ROOT))
        tracked = f"mlflow.tracking_uri=sqlite:///{head.local}/mlflow.db"  # the job's own folder is refused
        head.run(*submit, "--", "python", *curriculum(manifest, "s3://training/cut"), tracked, environment=jobs)

        def log() -> str:
            return ask(head, jobs, "/api/jobs/train/logs").get("logs", "")

        def status() -> str:
            return ask(head, jobs, "/api/jobs/train").get("status", "")

        def trains() -> bool:
            assert status() in ("", "PENDING", "RUNNING"), log()
            return last_step(log()) >= 8

        wait_for(trains, "training", head)
        training = [name for name in "abc" if "RayTrainWorker" in "".join(hosts[name].processes().values())]
        assert len(training) == 2
        hosts[training[0]].cut_off()
        cut = time.monotonic()
        wait_for(lambda: "resumes: " in log(), "a resume", head)
        resumed = time.monotonic() - cut
        before, _, after = log().partition("resumes: ")
        assert last_step(before) < STEPS
        assert nodes_alive(head, jobs) == 3
        wait_for(lambda: last_step(log().partition("resumes: ")[2]) > 0, "a step after the cut", head)
        stepped = time.monotonic() - cut

        wait_for(lambda: status() in ("SUCCEEDED", "FAILED", "STOPPED"), "the end", head)
        before, _, after = log().partition("resumes: ")
        assert status() == "SUCCEEDED", log()
        assert last_step(after) == STEPS
        assert before.count("starts: ") == 1
        assert "starts: " not in after, "it began anew instead of going on from a checkpoint"
        with capsys.disabled():
            told = f"cut off at step {last_step(before)}, resumed after {resumed:.0f} s, a step after {stepped:.0f} s"
            print(f"\n{told}")
        found = load_file(fetched_weights(tmp_path, head, jobs))
    for name, tensor in undisturbed_weights(local_manifest, tmp_path / "undisturbed").items():
        assert torch.equal(found[name], tensor), name


def ask(head: Host, jobs: dict[str, str], path: str) -> dict[str, Any]:
    """Ray's dashboard, from the head's network; nothing while it does not answer."""
    code = """
import json, os, sys, urllib.request
headers = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
request = urllib.request.Request(os.environ["RAY_API_SERVER_ADDRESS"] + sys.argv[1], headers=headers)
try:
    print(urllib.request.urlopen(request, timeout=10).read().decode())
except OSError:
    print("{}")
"""
    return json.loads(head.run(sys.executable, "-c", code, path, environment=jobs))


def nodes_alive(head: Host, jobs: dict[str, str]) -> int:
    nodes = ask(head, jobs, "/api/v0/nodes").get("data", {}).get("result", {}).get("result", [])
    return sum(node["state"] == "ALIVE" for node in nodes)


def last_step(log: str) -> int:
    """Of the newest progress line; 0 without one."""
    return max((int(step) for step in re.findall(r"step=(\d+)/\d+ rank=0 loss=", log)), default=0)


def make_dataset(folder: Path) -> str:
    """Shards of a synthetic dataset; returns the manifest's URL."""
    raw, made = folder / "raw", open_store(str(folder / "shards"))
    write_dataset("chairs", raw, pairs=8, held_out=2, height=96, width=128, seed=1)
    files = sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*") if path.is_file())
    tree = SourceTree(str(raw), files, lambda name: (raw / name).read_bytes())
    refs = SOURCES["chairs"](tree)
    (plan,) = plan_shards(refs, {ref.key: 1 for ref in refs}, dict.fromkeys(files, ""), 2**30)
    shard = write_shard(plan, tree, made)
    assert shard.entry is not None
    return build("chairs", [shard.entry], {}).publish(made)


def put_on_s3(manifest: str, head: Host, jobs: dict[str, str]) -> str:
    """Upload shards and manifest from the head's network; returns the manifest's URL there."""
    code = """
import sys
from datasets_etl.storage import open_store
source, target = map(open_store, sys.argv[1:])
for item in source.walk():
    target.write(item.key, source.read(item.key))
"""
    source, _, name = manifest.rpartition("/")
    target = "s3://datasets/flow/chairs"
    head.run(sys.executable, "-c", code, source, target, environment=jobs | {"PYTHONPATH": str(ROOT)})
    return f"{target}/{name}"


def fetched_weights(folder: Path, head: Host, jobs: dict[str, str]) -> Path:
    """The stage's final weights, brought from S3 by the head."""
    code = """
import sys
from pathlib import Path
from datasets_etl.storage import open_store
store = open_store("s3://training/cut")
(final,) = [item.key for item in store.walk() if item.key.endswith("/final.safetensors")]
Path(sys.argv[1]).write_bytes(store.read(final))
"""
    path = folder / "final.safetensors"
    head.run(sys.executable, "-c", code, str(path), environment=jobs | {"PYTHONPATH": str(ROOT)})
    return path


def undisturbed_weights(manifest: str, storage: Path) -> dict[str, torch.Tensor]:
    """Of the same stage on this machine."""
    config, *overrides = curriculum(manifest, str(storage))[2:]
    overrides += ["machine.placement=pack", f"mlflow.tracking_uri=sqlite:///{storage.with_suffix('.db')}"]
    (result,) = run_curriculum(load_config(CurriculumConfig, str(ROOT / config), overrides))
    return load_file(result.weights.removeprefix("file://"))


def curriculum(manifest: str, storage: str) -> list[str]:
    return [
        *("pipelines/curriculum.py", "--config", "pipelines/configs/demo.yaml", "only=[chairs]"),
        *(f"storage={storage}", f"data.chairs={manifest}"),
        *("machine.micro_batch=2", "machine.placement=strict_spread", f"stages.chairs.steps={STEPS}"),
        *("stages.chairs.global_batch=4", "stages.chairs.checkpoint_every=4", "stages.chairs.log_every=2"),
        "stages.chairs.validation=[{data: chairs, subset: val}]",
    ]
