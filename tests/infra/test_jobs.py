"""`ray job submit` as the README shows it, against a real job server: S3 for data, an MLflow server for runs.

The stack's Ray has a head without CPUs and two workers, each with a temporary directory of its own.
"""

import contextlib
import json
import re
import signal

import psutil
import pytest
from mlflow.tracking import MlflowClient

from datasets_etl.synthetic import write_dataset
from tests.infra.conftest import RunningStack, stack_command
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

STEPS = 60
TOLD = list(range(2, STEPS + 1, 2))


@pytest.fixture(scope="module")
def manifest(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset whose raw files lie on S3, sharded by a job."""
    raw = tmp_path_factory.mktemp("raw")
    write_dataset("chairs", raw, pairs=12, held_out=3, height=96, width=128, seed=1)
    for path in (path for path in raw.rglob("*") if path.is_file()):
        stack.s3().upload_file(str(path), "datasets", f"raw/chairs/{path.relative_to(raw).as_posix()}")
    etl = ("pipelines/etl.py", "--dataset", "chairs", "--source", "s3://datasets/raw/chairs")
    log = stack.submit(*etl, "--target", "s3://datasets/flow")
    (url,) = re.findall(r"^s3://datasets/flow/chairs/manifest-[0-9a-f]{16}\.json$", log, re.MULTILINE)
    return url


def curriculum(manifest: str, name: str) -> list[str]:
    """A stage of the demo's curriculum on two nodes, by overrides as on a real cluster."""
    return [
        *("pipelines/curriculum.py", "--config", "pipelines/configs/demo.yaml", "only=[chairs]", f"name={name}"),
        *(f"storage=s3://training/{name}", f"data.chairs={manifest}", "mlflow.tracking_uri=null"),
        *("machine.micro_batch=2", "machine.placement=spread", f"stages.chairs.steps={STEPS}"),
        *("stages.chairs.global_batch=4", "stages.chairs.checkpoint_every=2", "stages.chairs.log_every=2"),
        "stages.chairs.validation=[{data: chairs, subset: val}]",
    ]


@pytest.fixture(scope="module")
def undisturbed(stack: RunningStack, manifest: str) -> str:
    """The log of a curriculum nobody interfered with."""
    return stack.submit(*curriculum(manifest, "undisturbed"))


def final_weights(stack: RunningStack, name: str) -> bytes:
    (key,) = [key for key in stack.keys("training", name) if key.endswith("/final.safetensors")]
    return stack.s3().get_object(Bucket="training", Key=key)["Body"].read()


def checkpoints(stack: RunningStack, name: str) -> set[str]:
    return {key for key in stack.keys("training", name) if "/checkpoints/" in key and key.endswith(".json")}


def submit_to_next_checkpoint(stack: RunningStack, job: str, manifest: str, name: str) -> None:
    """Start the curriculum as a job and leave once it has written a checkpoint more."""
    before = checkpoints(stack, name)
    begun = stack.job(
        *("submit", "--no-wait", "--submission-id", job, "--working-dir", "."),
        *("--", "python", *curriculum(manifest, name)),
    )
    assert begun.returncode == 0, begun.stderr

    def written() -> bool:
        assert runs(stack, job), stack.job("logs", job).stdout
        return bool(checkpoints(stack, name) - before)

    wait_until(written, lambda: stack.job("logs", job).stdout, every_s=0.2)
    assert not [key for key in stack.keys("training", name) if key.endswith("/result.json")]


def wait_for_end(stack: RunningStack, job: str) -> None:
    """A job that is told to stop has some seconds to do so."""
    wait_until(lambda: not runs(stack, job), lambda: stack.job("logs", job).stdout, every_s=0.2)


def runs(stack: RunningStack, job: str) -> bool:
    return stack.ask(f"/api/jobs/{job}")["status"] in ("PENDING", "RUNNING")


def test_a_stopped_job_and_a_cluster_that_died_resume_to_the_bit(stack: RunningStack, manifest: str, undisturbed: str):
    submit_to_next_checkpoint(stack, "first", manifest, "disturbed")
    assert stack.ask("/api/jobs/first/stop", "POST") == {"stopped": True}
    wait_for_end(stack, "first")
    status = stack.job("status", "first")
    assert "was stopped" in status.stdout + status.stderr
    assert f"stage=chairs step=0/{STEPS} rank=0 starts" in stack.job("logs", "first").stdout

    submit_to_next_checkpoint(stack, "second", manifest, "disturbed")
    cluster = psutil.Process(json.loads((stack.folder / "ray.json").read_text())["pid"])
    for process in [cluster, *cluster.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # some end by themselves at any time
            process.send_signal(signal.SIGKILL)
    health = stack_command("status", "--dir", str(stack.folder))
    assert health.returncode == 1
    assert re.search(r"ray +│ down", health.stdout)
    assert re.search(r"s3 +│ healthy", health.stdout)

    assert stack.up().returncode == 0
    log = stack.submit(*curriculum(manifest, "disturbed"), name="third")
    assert "resumes: " in log
    assert "starts: " not in log
    assert final_weights(stack, "disturbed") == final_weights(stack, "undisturbed")
    assert told_steps(stack, "disturbed") == told_steps(stack, "undisturbed") == TOLD


def told_steps(stack: RunningStack, name: str) -> list[int]:
    """Steps that MLflow has of a curriculum's stage, which the jobs reached by the nodes' environment."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in stack.facts.environment.items():
            patch.setenv(variable, value)
        client = MlflowClient(stack.facts.mlflow_url)
        experiment = client.get_experiment_by_name("gmflow")
        (parent,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        (child,) = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
        return [metric.step for metric in client.get_metric_history(child.info.run_id, "train/loss")]


def test_the_log_shows_progress_and_the_result(undisturbed: str):
    assert re.search(
        rf"stage=chairs step={STEPS}/{STEPS} rank=0 loss=\d+\.\d+ epe=\d+\.\d+ lr=.* samples/s=.* eta=0:00:00",
        undisturbed,
    )
    assert "2 workers" in undisturbed
    assert re.search(r"chairs +│ +\d+\.\d{3} │ models:/gmflow/\d+", undisturbed)


def test_the_code_that_ran_is_the_one_submitted_and_no_secret_is_shown(stack: RunningStack, undisturbed: str):
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in stack.facts.environment.items():
            patch.setenv(variable, value)
        versions = MlflowClient(registry_uri=stack.facts.mlflow_url).search_model_versions("name = 'gmflow'")
    assert versions
    # The nodes' own Python has this checkout installed, with its commit; an upload has no .git.
    assert all(version.tags["code_version"].startswith("sources:") for version in versions)
    listed = stack.job("list")
    assert listed.returncode == 0
    told = listed.stdout + listed.stderr + undisturbed
    assert "pipelines/curriculum.py" in told
    for secret in (stack.facts.secrets.s3_secret_key, stack.facts.secrets.mlflow_password):
        assert secret not in told


def test_a_sweep_as_a_job_trains_a_trial_and_leaves_its_report_on_s3(stack: RunningStack, manifest: str):
    log = stack.submit(
        *("pipelines/sweep.py", "--config", "pipelines/configs/sweep_demo.yaml", f"data.chairs={manifest}"),
        *("storage=s3://training/sweeps", "tune.stage.steps=4", "tune.stage.validate_every=2", "tune.trials=1"),
    )
    assert "report" in log
    (key,) = [key for key in stack.keys("training", "sweeps") if key.endswith("report/sweep.json")]
    report = json.loads(stack.s3().get_object(Bucket="training", Key=key)["Body"].read())
    (trial,) = [row for row in report["rows"] if row["phase"] == "trial"]
    assert (trial["status"], trial["step"]) == ("finished", 4)
    assert trial["val/chairs/val/epe"] > 0


def test_evaluation_as_a_job_reads_model_and_data_and_writes_to_s3(
    stack: RunningStack, manifest: str, undisturbed: str
):
    arguments = ("--model", "models:/gmflow@champion", "--data", manifest, "--subset", "val")
    log = stack.submit("pipelines/evaluate.py", *arguments, "--output", "s3://training/scores")
    (line,) = [line for line in log.splitlines() if line.startswith("{")]
    figures = json.loads(line)
    written = json.loads(stack.s3().get_object(Bucket="training", Key="scores/metrics.json")["Body"].read())
    assert written["pooled"]["epe"] == figures["epe"]
    assert figures["pairs"] == 3
