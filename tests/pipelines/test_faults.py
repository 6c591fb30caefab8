"""What happens to a stage when machines, workers and storage fail under it: the model is the undisturbed one's.

Kills of a worker and of the driver are in test_curriculum.py.
"""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from torch.optim.lr_scheduler import OneCycleLR

from datasets_etl.batches import collate
from datasets_etl.etl import run_etl
from datasets_etl.loader import PositionDataset
from datasets_etl.manifest import Manifest
from datasets_etl.synthetic import write_dataset
from gmflow import load_model
from pipelines.config_file import load_config
from pipelines.curriculum import run_curriculum
from pipelines.training.config import CurriculumConfig
from tests.mlflow_server import mlflow_running
from tests.pipelines.conftest import Workplace, workplace_in
from tests.pipelines.machines import Job, Machines, actors, train_workers
from tests.seaweedfs import S3Server, running
from tests.waiting import output_of, wait_until

pytestmark = pytest.mark.slow

RAY_LOOKS_EVERY_S = 20  # for machines that came, whatever the interval asked for

# Steps long enough for something to happen in the middle of a stage. Few and at a low rate, because another number of
# workers rounds differently, and training makes more of any difference with every step.
STEPS = 24
SLOW = ["only=[chairs]", f"stages.chairs.steps={STEPS}", "stages.chairs.crop=[192, 256]", "stages.chairs.peak_lr=2e-5"]
SLOW += ["stages.chairs.checkpoint_every=4", "stages.chairs.log_every=1"]

# As in test_curriculum.py: what no output depends on.
FREE_BIASES = ("shortcut.bias", "propagation.key.bias")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, manifests: dict[str, str]) -> Workplace:
    """After a run of the slow stage on two workers that nobody interfered with."""
    workplace = workplace_in(tmp_path_factory.mktemp("undisturbed"), manifests)
    run_curriculum(slow_config(workplace))
    return workplace


@pytest.fixture(scope="module")
def expected(undisturbed: Workplace) -> dict[str, torch.Tensor]:
    """Its weights."""
    return final_weights(undisturbed)


def slow_config(workplace: Workplace) -> CurriculumConfig:
    overrides = [*SLOW, f"mlflow={{tracking_uri: '{workplace.tracking_uri}'}}"]
    return load_config(CurriculumConfig, str(workplace.write()), overrides)


def told_losses(tracking_uri: str) -> list[float]:
    """Of every step, as MLflow has them: each once and in order."""
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("gmflow").experiment_id
    (run,) = client.search_runs([experiment], filter_string="tags.stage = 'chairs'")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [entry.step for entry in history] == list(range(1, STEPS + 1))
    return [entry.value for entry in history]


def final_weights(workplace: Workplace) -> dict[str, torch.Tensor]:
    (path,) = (workplace.folder / "storage").glob("tiny-chairs-*/final.safetensors")
    return load_file(path)


@pytest.fixture
def machines(s3: S3Server) -> Iterator[Machines]:
    cluster = Machines()
    yield cluster
    cluster.cluster.shutdown()


def assert_same_to_the_bit(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_the_losses_of_twenty_steps_are_those_of_the_plainest_loop(undisturbed: Workplace):
    """Two workers of Ray Train with accumulated gradients, against the recipe written down in one process."""
    config = slow_config(undisturbed)
    stage = config.stages[0]
    (initial,) = (undisturbed.folder / "storage").glob("tiny-chairs-*/init.safetensors")
    model = load_model(initial).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.peak_lr, weight_decay=1e-4)
    schedule = OneCycleLR(optimizer, stage.peak_lr, stage.steps + 10, pct_start=0.05, cycle_momentum=False)
    (part,) = stage.mixture
    manifest = Manifest.load(str(config.data["chairs"]))
    samples = PositionDataset([part.build(manifest, stage.crop)], seed=config.seed)
    losses = []
    for step in range(20):
        image0, image1, flow, valid = collate([samples[step * 4 + i] for i in range(4)])
        predictions = model(image0.float(), image1.float()).predictions
        errors = [(valid[:, None] * (predicted - flow).abs()).mean() for predicted in predictions]
        loss = sum(0.9 ** (len(errors) - 1 - i) * error for i, error in enumerate(errors))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    told = told_losses(undisturbed.tracking_uri)[:20]
    assert told == pytest.approx(losses, rel=1e-3)
    # Before training has made more of what is rounded differently.
    assert told[:5] == pytest.approx(losses[:5], rel=1e-4)


def test_a_machine_that_is_to_go_is_left_in_time_and_nothing_is_lost(machines, expected, workplace: Workplace):
    hosts = [machines.add() for _ in range(3)]
    job = Job(
        workplace.start(
            *("curriculum.py", "--config", str(workplace.write()), *SLOW),
            RAY_ADDRESS=machines.address,
            RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2",
        )
    )
    job.wait_for(r"step=2/.* loss=")
    doomed = machines.at_work(hosts)[0]
    machines.give_notice(doomed)
    left = job.wait_for(r"rank=0 leaves: the machine of worker [01] is about to be taken away")
    job.wait_for(r"resumes", after=left)
    assert doomed not in machines.at_work(hosts)
    machines.lose(doomed)
    job.finish()
    assert job.step_of("resumes", after=left) == job.step_of("leaves"), "no step was done twice"
    assert_same_to_the_bit(expected, final_weights(workplace))


def test_a_machine_that_is_to_go_during_a_validation_is_left_in_time(
    machines, workplace: Workplace, tmp_path: Path, local_ray: None
):
    """A validation may take longer than the machine has left: it is given up, and made up for elsewhere."""
    write_dataset("chairs", tmp_path / "raw", pairs=2, held_out=40, height=192, width=256, seed=1)
    workplace.config["data"]["chairs"] = run_etl("chairs", str(tmp_path / "raw"), str(tmp_path / "set")).manifest_url
    workplace.config["model"] |= {"backbone_channels": [16, 24, 32], "feature_channels": 64, "num_layers": 4}
    workplace.config["machine"]["num_workers"] = 1
    hosts = [machines.add() for _ in range(2)]
    stage = ("only=[chairs]", "stages.chairs.steps=4", "stages.chairs.validate_every=2", "stages.chairs.log_every=1")
    job = Job(
        workplace.start(
            *("curriculum.py", "--config", str(workplace.write()), *stage),
            RAY_ADDRESS=machines.address,
            RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2",
        )
    )
    began = job.wait_for(r"step=2/.* loss=")
    (doomed,) = machines.at_work(hosts)
    with machines.standing_still(doomed):  # giving notice takes as long as a fast machine's validation
        machines.give_notice(doomed)
    left = job.wait_for(r"step=2/4 rank=0 leaves", after=began)
    resumed = job.wait_for(r"step=2/4 rank=0 resumes", after=left)
    job.wait_for(r"step=2/4 rank=0 validated", after=resumed)
    assert not [line for line in job.lines[:resumed] if "validated" in line], "the notice came too late for this test"
    job.process.send_signal(signal.SIGINT)
    assert job.end() == 130
    assert "interrupted; the same command goes on from here" in job.said()
    client = MlflowClient(workplace.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("gmflow").experiment_id])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"], "the stage's and the curriculum's"


def test_a_lost_machine_is_gone_on_without_until_there_is_another(
    machines, undisturbed: Workplace, expected, workplace: Workplace
):
    hosts = [machines.add() for _ in range(2)]
    job = Job(
        workplace.start(
            *("curriculum.py", "--config", str(workplace.write()), *SLOW),
            *("machine.min_workers=1", "machine.grow_interval_s=1"),
            RAY_ADDRESS=machines.address,
            RAY_health_check_period_ms="500",
            # How long Ray Train tries to get as many workers as before.
            RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="8",
        )
    )
    job.wait_for(r"step=9/.* loss=")
    lost = machines.at_work(hosts)[-1]
    machines.lose(lost)
    hosts.remove(lost)
    alone = job.wait_for(r"resumes: .* on 1 worker,")
    assert job.step_of("resumes") >= 4, "at most the steps since the newest stored checkpoint are done again"
    with machines.standing_still(machines.at_work(hosts)[0]):  # it would be done before Ray has seen the other
        machines.add()
        time.sleep(RAY_LOOKS_EVERY_S + 1)
    job.wait_for(r"resumes: .* on 2 workers", after=alone)
    job.finish()
    assert told_losses(workplace.tracking_uri) == pytest.approx(told_losses(undisturbed.tracking_uri), rel=1e-5)
    found = final_weights(workplace)
    for name, tensor in expected.items():
        if not name.endswith(FREE_BIASES):
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_a_worker_that_hangs_and_servers_that_are_away_change_no_bit(
    undisturbed: Workplace, expected, workplace: Workplace, tmp_path: Path, s3: S3Server
):
    """Storage and MLflow go at once, and MLflow stays away for longer than the stage needs to end."""
    tracked = tmp_path / "tracked"
    tracked.mkdir()
    with running(tmp_path) as storage, mlflow_running(tracked, s3) as tracking:
        source = str(Path(workplace.config["data"]["chairs"].removeprefix("file://")).parents[2] / "chairs")
        command = ("etl.py", "--dataset", "chairs", "--source", source, "--target", "s3://data/sets")
        etl = workplace.start(*command, **storage.settings)
        manifest, errors = output_of(etl)
        assert etl.returncode == 0, errors
        overrides = [*SLOW, f"data.chairs={manifest.splitlines()[-1]}", "storage=s3://data/runs"]
        overrides += ["machine.hang_timeout_s=30", "machine.storage_patience_s=12"]
        settings = {**storage.settings, "MLFLOW_TRACKING_URI": tracking.url}
        job = Job(workplace.start("curriculum.py", "--config", str(workplace.write()), *overrides, **settings))
        job.wait_for(r"step=6/.* loss=")
        os.kill(train_workers(job.process.pid)[0], signal.SIGSTOP)
        hung = job.wait_for(r"hangs: no progress for 30 s while (computing|waiting).*; ended, to resume")
        resumed = job.wait_for(r"resumes|starts: ", after=hung)
        job.wait_for(r" loss=", after=resumed)
        (queue,) = actors(job.process.pid, "_Queue")
        job.process.send_signal(signal.SIGSTOP)  # so that the queue, which it empties, has something to lose
        time.sleep(1.5)
        queue.kill()
        job.process.send_signal(signal.SIGCONT)
        (controller,) = actors(job.process.pid, "TrainController")
        controller.kill()
        lost = job.wait_for(r"Ray was lost \(.*\); connects again and goes on")
        wait_until(lambda: train_workers(job.process.pid), job.said)
        os.kill(train_workers(job.process.pid)[0], signal.SIGKILL)  # while they start
        resumed = job.wait_for(r"resumes: |starts: ", after=lost)
        job.wait_for(r" loss=", after=resumed)
        tracking.kill()
        storage.kill()
        time.sleep(12)  # longer than a command would wait for a mistyped endpoint
        storage.start()
        job.wait_for(rf"step={STEPS}/.* loss=")
        tracking.start()
        job.finish()
        client = storage.client()
        keys = [found["Key"] for found in client.list_objects_v2(Bucket="data", Prefix="runs/")["Contents"]]
        (final,) = [key for key in keys if key.endswith("final.safetensors")]
        client.download_file("data", final, str(tmp_path / "final.safetensors"))
    assert_same_to_the_bit(expected, load_file(tmp_path / "final.safetensors"))
    assert told_losses(f"sqlite:///{tracked}/mlflow.db") == told_losses(undisturbed.tracking_uri)
