"""The curriculum as a user runs it: stages in order, resumed after a kill to the bit, told once to MLflow."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

import pipelines.curriculum
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from pipelines import report
from pipelines.claim import CLAIM, claimed
from pipelines.cluster import RayLostError
from pipelines.config_file import load_config
from pipelines.curriculum import run_curriculum
from pipelines.errors import OutageError, PipelineError
from pipelines.references import resolve_model
from pipelines.training import mlflow_client
from pipelines.training.beginning import provide_initial_weights
from pipelines.training.config import CurriculumConfig, ModelConfig
from pipelines.training.dry_run import show_dry_run
from pipelines.training.plan import StagePlan, plan_curriculum
from tests.pipelines.conftest import Call, Workplace, workplace_in
from tests.pipelines.machines import train_workers
from tests.waiting import output_of, wait_until

pytestmark = pytest.mark.slow

# From three on, the bits of a sum of gradients depend on where they lie; they have unequal shares of a batch of four.
WORKERS = 3

# No output depends on these (an instance norm follows, or a softmax over what they shift), so their gradient is nothing
# but rounding, which Adam scales up to whole steps.
FREE_BIASES = ("shortcut.bias", "propagation.key.bias")


def run(workplace: Workplace, *overrides: str) -> str:
    process = workplace.start("curriculum.py", "--config", str(workplace.write()), *overrides)
    output, errors = output_of(process)
    assert process.returncode == 0, errors
    return output


def stage_folder(workplace: Workplace, stage: str) -> Path:
    (folder,) = (workplace.folder / "storage").glob(f"tiny-{stage}-*")
    return folder


def final_weights(workplace: Workplace, stage: str) -> dict[str, torch.Tensor]:
    return load_file(stage_folder(workplace, stage) / "final.safetensors")


def wait_for_checkpoint(process: subprocess.Popen[str], workplace: Workplace, stage: str, count: int = 2) -> None:
    """Until the stage has that many checkpoints."""
    pattern = f"storage/tiny-{stage}-*/checkpoints/step_*.json"

    def written() -> bool:
        assert process.poll() is None, process.communicate()
        return len(list(workplace.folder.glob(pattern))) >= count

    wait_until(written)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, manifests) -> Workplace:
    """A whole run nobody interfered with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    workplace = workplace_in(folder, manifests)
    workplace.config["machine"]["num_workers"] = WORKERS
    run(workplace)
    return workplace


def test_killed_workers_and_a_killed_driver_change_no_bit(undisturbed: Workplace, workplace: Workplace):
    """More workers than a stage may lose in a row: each comes after a new checkpoint."""
    workplace.config["machine"] |= {"max_failures": 1, "num_workers": WORKERS}
    workplace.config["stages"][0]["keep_last"] = 100  # so that new ones can be counted
    config = str(workplace.write())
    first = workplace.start("curriculum.py", "--config", config)
    for checkpoints in (2, 4):
        wait_for_checkpoint(first, workplace, "chairs", checkpoints)
        os.kill(train_workers(first.pid)[0], signal.SIGKILL)
    wait_for_checkpoint(first, workplace, "mix")
    orphans = train_workers(first.pid)
    first.kill()
    told, _ = first.communicate()
    assert "stage=chairs" in told
    assert told.count("resumes") >= 2, "a worker was killed before its first checkpoint or after its last"
    assert len(re.findall(r"stage=chairs worker \d failed: its process is gone", told)) == 2, told
    assert not (stage_folder(workplace, "mix") / "result.json").exists()
    wait_for_end(orphans)
    damage_newest_checkpoint(workplace, "mix")

    again = workplace.start("curriculum.py", "--config", config)
    output, errors = output_of(again)
    assert again.returncode == 0, errors
    assert "damaged checkpoint" in errors
    assert "stage=chairs finished earlier" in output
    assert "claimed by" not in output, "a driver that was killed on this machine is not waited for"
    assert "resumes" in output
    for stage in ("chairs", "mix"):
        expected, found = final_weights(undisturbed, stage), final_weights(workplace, stage)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), stage
    assert_tracked_once(workplace)


def wait_for_end(pids: list[int]) -> None:
    """Workers go on for some seconds after their driver was killed, and write checkpoints."""
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def damage_newest_checkpoint(workplace: Workplace, stage: str) -> None:
    facts = sorted((stage_folder(workplace, stage) / "checkpoints").glob("step_*.json"))[-1]
    newest = facts.with_name(f"{facts.stem}-{json.loads(facts.read_text())['sha256'][:16]}.pt")
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)


def assert_tracked_once(workplace: Workplace) -> None:
    """One parent, one child a stage, every step once and in order, the same values as undisturbed."""
    client = MlflowClient(workplace.tracking_uri)
    experiment = client.get_experiment_by_name("gmflow")
    runs = client.search_runs([experiment.experiment_id])
    children = {run.data.tags["stage"]: run for run in runs if "stage" in run.data.tags}
    assert len(runs) == 3
    assert set(children) == {"chairs", "mix"}
    (parent,) = [run for run in runs if "stage" not in run.data.tags]
    told = client.get_metric_history(parent.info.run_id, "val/chairs/val/epe")
    assert [metric.step for metric in told] == [0, 1]
    for child in children.values():
        assert child.info.status == "FINISHED"
        steps = [metric.step for metric in client.get_metric_history(child.info.run_id, "train/loss")]
        assert steps == list(range(2, 41, 2))


def test_mlflow_holds_curves_config_manifests_and_pictures(undisturbed: Workplace):
    assert_tracked_once(undisturbed)
    client = MlflowClient(undisturbed.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("gmflow").experiment_id])
    (parent,) = [run for run in runs if "stage" not in run.data.tags]
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"config.yaml", "manifests.json"} <= names
    assert parent.data.tags["manifest.chairs"].endswith(".json")
    for child in (run for run in runs if "stage" in run.data.tags):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {"train/loss", "train/epe", "train/lr", "train/grad_norm", "val/chairs/val/epe"} <= set(
            child.data.metrics
        )
        (picture,) = client.list_artifacts(child.info.run_id, "pictures")
        assert picture.path == "pictures/chairs_val_step_000040.png"


def test_the_report_shows_every_stages_curves_the_validation_sets_and_pairs_of_them(undisturbed: Workplace):
    client = MlflowClient(undisturbed.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("gmflow").experiment_id])
    (parent,) = [run for run in runs if "stage" not in run.data.tags]
    page = Path(client.download_artifacts(parent.info.run_id, "report.html", str(undisturbed.folder))).read_text()
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    shown = json.loads(text)
    curves = {curve["title"]: curve for curve in shown["curves"]}
    assert [series["name"] for series in curves["Training loss"]["series"]] == ["chairs", "mix"]
    assert curves["Training loss"]["boundaries"] == [40]
    assert curves["Training loss"]["series"][1]["points"][-1][0] == 80
    assert [point[0] for point in curves["Validation EPE, px"]["series"][0]["points"]] == [40, 80]
    (table,) = shown["tables"]
    assert (table["title"], [row[0] for row in table["rows"]]) == ("chairs/val", ["chairs", "mix"])
    stages = [run for run in runs if "stage" in run.data.tags]
    tracked = {run.data.tags["stage"]: run.data.metrics["val/chairs/val/epe"] for run in stages}
    assert [row[1] for row in table["rows"]] == [tracked["chairs"], tracked["mix"]]
    assert len(shown["cards"]) == 3  # all of the validation set
    # The model that was registered made them: their mean is what the stage's own validation found.
    assert np.mean([card["figures"]["epe"] for card in shown["cards"]]) == pytest.approx(tracked["mix"], rel=1e-3)


def test_every_stage_is_registered_with_its_lineage(undisturbed: Workplace):
    client = MlflowClient(undisturbed.tracking_uri, undisturbed.tracking_uri)
    versions = {version.tags["stage"]: version for version in client.search_model_versions("name = 'gmflow'")}
    assert set(versions) == {"chairs", "mix"}
    results = {stage: json.loads((stage_folder(undisturbed, stage) / "result.json").read_text()) for stage in versions}
    for stage, version in versions.items():
        assert version.tags["config_hash"] == results[stage]["config_hash"]
        assert "sources:" in version.tags["code_version"]
        assert float(version.tags["val.chairs.val.epe"]) == pytest.approx(
            results[stage]["metrics"]["val/chairs/val/epe"], rel=1e-4
        )
    assert versions["chairs"].tags["parent"] == "random"
    assert versions["mix"].tags["parent"] == f"models:/gmflow/{versions['chairs'].version}"
    assert set(json.loads(versions["mix"].tags["manifests"])) == {"sintel", "kitti"}

    aliases = client.get_registered_model("gmflow").aliases
    assert (aliases["chairs"], aliases["mix"]) == (versions["chairs"].version, versions["mix"].version)
    epe = {stage: result["metrics"]["val/chairs/val/epe"] for stage, result in results.items()}
    best = "mix" if epe["mix"] < epe["chairs"] else "chairs"
    assert aliases["champion"] == versions[best].version


def test_a_registered_model_comes_back_with_the_stages_weights(undisturbed: Workplace):
    model = resolve_model("models:/gmflow@mix", undisturbed.tracking_uri)
    expected = final_weights(undisturbed, "mix")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.usefixtures("local_ray")
def test_a_finished_curriculum_is_skipped_whole(undisturbed: Workplace, call: Call):
    before = final_weights(undisturbed, "mix")
    tracked = f"mlflow={{tracking_uri: '{undisturbed.tracking_uri}'}}"
    code, output, errors = call(pipelines.curriculum, "--config", undisturbed.write(), tracked)
    assert code == 0, errors
    assert output.count("finished earlier") == 2
    assert "starts" not in output
    assert "resumes" not in output
    assert all(torch.equal(tensor, before[name]) for name, tensor in final_weights(undisturbed, "mix").items())
    assert_tracked_once(undisturbed)


@pytest.mark.usefixtures("local_ray")
def test_one_worker_and_two_and_storage_on_s3_give_the_same_model(manifests: dict[str, str], tmp_path: Path):
    """Few steps at a low rate: rounding, which the split does change, grows with every step of any training."""
    found = []
    for workers, micro_batch, storage in ((2, 1, str(tmp_path / "storage")), (1, 4, f"s3://data/{tmp_path.name}")):
        workplace = workplace_in(tmp_path / str(workers), manifests)
        workplace.folder.mkdir()
        overrides = [f"storage={storage}", "stages.chairs.steps=6", "stages.chairs.peak_lr=1e-4"]
        overrides += [f"machine={{num_workers: {workers}, micro_batch: {micro_batch}}}"]
        config = resolved(workplace, "only=[chairs]", *overrides)
        (result,) = run_curriculum(config)
        assert run_curriculum(config) == [result], "a finished stage is found again"
        trained, registered = (
            resolve_model(ref, workplace.tracking_uri).state_dict() for ref in (result.weights, "models:/gmflow@chairs")
        )
        assert all(torch.equal(tensor, registered[name]) for name, tensor in trained.items())
        assert not (workplace.folder / "storage").exists()
        found.append((result, trained))
    (here, weights), (there, other_weights) = found
    assert there.weights.startswith(f"s3://data/{tmp_path.name}/tiny-chairs-")
    assert there.metrics["train/loss"] == pytest.approx(here.metrics["train/loss"], rel=1e-5)
    for name, tensor in weights.items():
        if not name.endswith(FREE_BIASES):
            torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.usefixtures("local_ray")
def test_a_report_that_fails_undoes_nothing_and_says_how_to_make_it(undisturbed: Workplace, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise TypeError("no picture")

    monkeypatch.setattr(pipelines.curriculum.report, "log_curriculum_report", fail)
    results = run_curriculum(resolved(undisturbed, "only=[chairs]"))
    assert [result.stage for result in results] == ["chairs"]
    told = capsys.readouterr().out
    (run_id,) = re.findall(r"could not be made \(no picture\).*report.py --run (\w+)", " ".join(told.split()))
    monkeypatch.undo()
    client = mlflow_client.connect(undisturbed.tracking_uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    # Its stage was another command's: that one's curves are shown.
    made = report.curriculum_report(client, report.read_curriculum(client, run_id), 0)
    assert [list(curve.series) for curve in made.curves if curve.title == "Training loss"] == [["chairs"]]
    assert report.read_curriculum(client, results[0].mlflow_run).config.name == "tiny"  # its curriculum's
    # What is trained alone has a run of its own: the whole curriculum's keeps its config.
    chosen = {run: config["only"] for run, config in run_configs(client).items()}
    assert chosen.pop(run_id) == ["chairs"]
    assert None in chosen.values()


def run_configs(client: MlflowClient) -> dict[str, dict[str, Any]]:
    """Run → config of what has been trained as a whole or as some of its stages."""
    runs = client.search_runs([client.get_experiment_by_name("gmflow").experiment_id])
    ids = [run.info.run_id for run in runs if "stage" not in run.data.tags]
    return {run: yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{run}/config.yaml")) for run in ids}


@pytest.mark.usefixtures("local_ray")
def test_a_report_of_a_training_on_gpus_is_made_where_there_are_none(undisturbed: Workplace):
    client = mlflow_client.connect(undisturbed.tracking_uri)
    ((run_id, config),) = [found for found in run_configs(client).items() if found[1]["only"] is None]
    config["machine"]["use_gpu"] = True
    trained = client.get_run(run_id)
    elsewhere = client.create_run(trained.info.experiment_id, tags=trained.data.tags).info.run_id
    client.log_text(elsewhere, yaml.safe_dump(config), "config.yaml")
    assert len(report.curriculum_report(client, report.read_curriculum(client, elsewhere), 1).cards) == 1
    client.delete_run(elsewhere)


def test_ctrl_c_ends_a_wait_for_room_which_a_second_driver_does_not_share(workplace: Workplace):
    """Just when somebody sees that the GPUs are missing."""
    workplace.config["machine"]["use_gpu"] = True
    config = str(workplace.write())
    process = workplace.start("curriculum.py", "--config", config)
    wait_until(lambda: any("TrainController" in " ".join(one.cmdline()) for one in below(process)))
    second = workplace.start("curriculum.py", "--config", config)  # meanwhile the first asks for a placement
    _, errors = output_of(second)
    assert second.returncode == 2, errors
    assert re.search(rf"stage chairs: the driver on \S+ \(process {process.pid}, since .*\) works on it; let", errors)
    assert "Traceback" not in errors
    client = MlflowClient(workplace.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("gmflow").experiment_id])
    assert [run.info.status for run in runs] == ["RUNNING", "RUNNING"], "the first one's, untouched"
    process.send_signal(signal.SIGINT)
    output, errors = output_of(process)
    assert process.returncode == 130, errors
    assert "stage=chairs waits for room: 2 workers need 1 CPU and a GPU each" in output
    assert "interrupted; the same command goes on from here" in errors
    assert "Traceback" not in errors
    assert not list(workplace.folder.rglob(CLAIM)), "another one may go on"
    runs = client.search_runs([client.get_experiment_by_name("gmflow").experiment_id])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"], "the stage's and the curriculum's"


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).children(recursive=True)
    return []


@pytest.mark.usefixtures("local_ray")
def test_the_driver_waits_for_storage_as_the_workers_do(undisturbed: Workplace, monkeypatch):
    """Once the curriculum has begun: before, what does not answer is a mistyped address."""
    waits = []
    look = StagePlan.result
    monkeypatch.setattr(StagePlan, "result", lambda plan: waits.append(os.environ.get(PATIENCE_VARIABLE)) or look(plan))
    run_curriculum(resolved(undisturbed, "machine.storage_patience_s=77"))
    assert waits == [None, None, "77.0", "77.0"]
    assert PATIENCE_VARIABLE not in os.environ


def test_weights_are_named_by_what_they_were(undisturbed: Workplace, tmp_path: Path):
    """In the lineage: the alias a stage begins from may move to what it ends with."""
    model, uri = ModelConfig(**undisturbed.config["model"]), undisturbed.tracking_uri
    version = mlflow_client.connect(uri).get_model_version_by_alias("gmflow", "chairs").version
    folder = open_store(str(tmp_path / "stage"))
    assert provide_initial_weights(folder, model, 0, "models:/gmflow@chairs", uri) == f"models:/gmflow/{version}"
    assert provide_initial_weights(folder, model, 0, "models:/gmflow@champion", uri) == f"models:/gmflow/{version}"
    path = stage_folder(undisturbed, "mix") / "final.safetensors"
    named = provide_initial_weights(open_store(str(tmp_path / "other")), model, 0, str(path), uri)
    assert named == f"{path} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]})"


@pytest.mark.parametrize(
    ("reached", "is_ended"),
    [([10, 10, 10], True), ([10, 10, 20, 20], False), ([10, 20, 30, 40, 50], False), ([10, 20, 20, 20], True)],
)
def test_ray_may_be_lost_as_often_as_workers_may_fail(reached, is_ended, workplace, monkeypatch, capsys):
    """Twice here without a new checkpoint. `reached`: the newest one, each time that Ray is lost."""
    seen = iter([[step] for step in reached])
    left = len(reached)

    def run(config: CurriculumConfig, *, goes_on: bool) -> list[str]:
        nonlocal left
        assert goes_on == (left < len(reached)) == (PATIENCE_VARIABLE in os.environ), "what is away is waited for"
        left -= 1
        if left < 0:
            return ["done"]
        raise RayLostError("its controller was killed")

    monkeypatch.setattr(pipelines.curriculum, "_connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(pipelines.curriculum, "_newest_checkpoints", lambda config: [next(seen)])
    monkeypatch.setattr(pipelines.curriculum, "run_curriculum", run)
    config = resolved(workplace, "machine.max_failures=2")
    if is_ended:
        with pytest.raises(OutageError, match=r"^Ray was lost \(its controller was killed\); give the same command"):
            pipelines.curriculum._run_to_its_end(config, argparse.Namespace())
        assert left == 0, "not before the third time"
    else:
        assert pipelines.curriculum._run_to_its_end(config, argparse.Namespace()) == ["done"]
    assert "Ray was lost (its controller was killed); connects again and goes on" in capsys.readouterr().out


def resolved(workplace: Workplace, *overrides: str) -> CurriculumConfig:
    tracked = f"mlflow={{tracking_uri: '{workplace.tracking_uri}'}}"
    return load_config(CurriculumConfig, str(workplace.write()), [tracked, *overrides])


@pytest.mark.usefixtures("local_ray")
def test_a_stage_that_misses_its_gate_is_the_last(undisturbed: Workplace):
    gate = "stages.chairs.gates=[{data: chairs, subset: val, below: 0.01}]"
    with pytest.raises(PipelineError, match=r"stage chairs: stopped at its gate: val/chairs/val/epe is \d+\.\d+, not"):
        run_curriculum(resolved(undisturbed, gate))
    passed = run_curriculum(resolved(undisturbed, gate.replace("0.01", "1000")))
    assert [result.stage for result in passed] == ["chairs", "mix"]


@pytest.mark.usefixtures("local_ray")
def test_a_later_stage_alone_goes_on_from_the_finished_one_before_it(undisturbed: Workplace, workplace: Workplace):
    (result,) = run_curriculum(resolved(undisturbed, "only=[mix]"))
    assert result.weights == (stage_folder(undisturbed, "mix") / "final.safetensors").as_uri()
    with pytest.raises(PipelineError, match=r"mix starts from what chairs ended with, which is not finished in .*"):
        run_curriculum(resolved(workplace, "only=[mix]"))


@pytest.mark.usefixtures("local_ray")
def test_a_dry_run_tells_where_each_stage_stands_and_writes_nothing(
    undisturbed: Workplace, workplace: Workplace, capsys
):
    show_dry_run(resolved(undisturbed, "stages.mix.steps=400"))
    out = capsys.readouterr().out
    config = yaml.safe_load(out.partition("\n\n")[0])
    assert config["stages"][1]["steps"] == 400
    chairs, mix = (line for line in out.splitlines() if re.match(r"│ (chairs|mix) ", line))
    assert [cell.strip() for cell in chairs.split("│")[2:9]] == [
        *("finished", "random weights", "40", "4", "32x48", "12", "13.3")
    ]
    assert [cell.strip() for cell in mix.split("│")[2:9]] == ["new", "chairs", "400", "4", "32x48", "24", "66.7"]
    assert re.search(r"\d:\d\d:\d\d │ +\d\.\d GiB", mix)
    assert "GiB" not in chairs, "what is finished takes no more time"

    show_dry_run(resolved(workplace, "machine.use_gpu=true"))
    told = capsys.readouterr().out
    (chairs,) = [line for line in told.splitlines() if line.startswith("│ chairs")]
    assert "GiB" not in chairs, "no estimate where Ray has no room for a worker"
    assert "waits for room: 2 workers need 1 CPU and a GPU each" in told
    assert "claimed" not in out + told
    assert not (workplace.folder / "storage").exists()
    assert not (workplace.folder / "mlflow.db").exists()

    config = resolved(workplace, "machine.use_gpu=true")
    folders = {plan.stage.name: plan.folder for plan in plan_curriculum(config)}
    with claimed({"stage mix": folders["mix"]}, pytest.fail):
        show_dry_run(config)
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "claimed" in line]
    assert told.startswith("stage mix: claimed by the driver on ")
