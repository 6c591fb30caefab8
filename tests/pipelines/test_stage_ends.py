"""What the driver does around a stage's workers: gates, lineage, what the next stage starts from, what is told."""

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load, load_file

import pipelines.curriculum
from datasets_etl.storage import open_store
from gmflow import GMFlow, save_weights
from pipelines import report
from pipelines.config_file import load_config
from pipelines.curriculum import run_curriculum
from pipelines.errors import PipelineError
from pipelines.training import registration, tracking
from pipelines.training.beginning import provide_initial_weights
from pipelines.training.config import CurriculumConfig, ModelConfig
from pipelines.training.launch import final_weights
from pipelines.training.plan import StageResult
from pipelines.training.registration import Lineage
from pipelines.training.stage import StageJob
from tests.pipelines.conftest import Workplace

EPE = "val/chairs/val/epe"


def snapshot(model: GMFlow, records: list[tuple[int, dict[str, float]]]) -> dict[str, Any]:
    return {"step": 40, "validated": 40, "model": model.state_dict(), "average": None, "records": records}


class Driver:
    """A curriculum whose workers are not there: every stage ends with weights of its own."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        self.records = [(2, {"train/loss": 3.0}), (40, {"train/loss": 2.0}), (40, {EPE: 5.0})]
        self.ran: list[str] = []
        self.jobs: list[StageJob] = []
        self.started_from: list[dict[str, torch.Tensor]] = []
        self.registered: list[Lineage] = []

    def fit(self, job: StageJob, name: str) -> dict[str, Any]:
        self.ran.append(job.stage.name)
        self.jobs.append(job)
        self.started_from.append(load(open_store(job.folder).read("init.safetensors")))
        torch.manual_seed(100 + len(self.ran))
        return snapshot(GMFlow(ModelConfig(**self.workplace.config["model"]).build()), self.records)

    def register(self, client: Any, name: str, run_id: str, weights: Path, lineage: Lineage, _: Any) -> Any:
        self.registered.append(lineage)
        return SimpleNamespace(name=name, version=str(len(self.registered)))

    def run(self, *overrides: str) -> list[StageResult]:
        tracked = f"mlflow={{tracking_uri: '{self.workplace.tracking_uri}'}}"
        return run_curriculum(load_config(CurriculumConfig, str(self.workplace.write()), [tracked, *overrides]))


@pytest.fixture
def driver(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver(workplace)
    monkeypatch.setattr(pipelines.curriculum, "fit_stage", driver.fit)
    monkeypatch.setattr(pipelines.curriculum, "listening", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(registration, "register", driver.register)
    monkeypatch.setattr(pipelines.curriculum.report, "log_curriculum_report", lambda client, run_id: None)
    return driver


def test_a_report_draws_each_stage_behind_the_one_before(driver: Driver):
    results = driver.run()
    client = MlflowClient(driver.workplace.tracking_uri)
    page = report.curriculum_report(client, report.read_curriculum(client, results[0].mlflow_run), pairs=0)
    curves = {curve.title: curve for curve in page.curves}
    assert curves["Training loss"].series == {"chairs": [(2, 3.0), (40, 2.0)], "mix": [(42, 3.0), (80, 2.0)]}
    assert curves["Validation EPE, px"].series == {"chairs/val": [(40, 5.0), (80, 5.0)]}
    assert [curve.boundaries for curve in page.curves] == [[40.0]] * len(page.curves)


def test_a_report_names_a_stages_own_model_though_somebody_gave_it_another_name_since(driver: Driver):
    """The other one has no lineage."""
    (result,) = driver.run("only=[chairs]")
    client = MlflowClient(driver.workplace.tracking_uri)
    for name, tags in (("gmflow", {"parent": "random"}), ("production", {})):
        client.create_registered_model(name)
        client.create_model_version(name, "file:///w", result.mlflow_run, tags)
    page = report.curriculum_report(client, report.read_curriculum(client, result.mlflow_run), pairs=0)
    assert ("stage chairs", "models:/gmflow/1: parent random") in page.facts


def test_a_report_says_in_a_line_that_a_stages_run_is_gone(driver: Driver):
    """`mlflow gc` was told to clear up."""
    (result,) = driver.run("only=[chairs]")
    client = MlflowClient(driver.workplace.tracking_uri)
    parent = client.get_run(result.mlflow_run).data.tags[tracking.PARENT_TAG]
    client.set_tag(parent, f"{tracking.STAGE_RUN_TAG}chairs", "0" * 32)
    with pytest.raises(PipelineError, match=rf"stage chairs: its run {'0' * 32} cannot be had from sqlite:"):
        report.read_curriculum(client, parent)


def test_what_is_trained_anew_has_runs_of_its_own(driver: Driver):
    """Otherwise MLflow would keep the curves of what was deleted, and leave the new ones out: it has those steps."""

    def stage_run(*overrides: str) -> str:
        (chairs, *_) = driver.run(*overrides)
        return chairs.mlflow_run

    first = stage_run()
    assert stage_run() == first
    (chairs,) = (driver.workplace.folder / "storage").glob("tiny-chairs-*")
    (chairs / "result.json").unlink()  # goes on, and registers again
    assert stage_run() == first
    shutil.rmtree(chairs)
    anew = stage_run()
    assert anew != first
    elsewhere = stage_run(f"storage={driver.workplace.folder / 'another'}")
    client = MlflowClient(driver.workplace.tracking_uri)
    parents = [client.get_run(run).data.tags["mlflow.parentRunId"] for run in (first, anew, elsewhere)]
    assert parents[0] == parents[1] != parents[2]


def test_what_an_earlier_version_began_goes_on_in_the_run_it_has(tmp_path: Path):
    """It wrote no mark into the folder, and its curriculum's run does not tell one storage from another."""
    folder = open_store(str(tmp_path))
    assert pipelines.curriculum._storage_identity(folder) == [folder.url]
    folder.write("init.txt", b"random")
    assert pipelines.curriculum._storage_identity(folder) == []
    folder.write("begun.txt", b"1")
    assert pipelines.curriculum._storage_identity(folder) == [folder.url]


def test_a_driver_that_was_taken_over_registers_nothing(driver: Driver, monkeypatch):
    """Also where no signal reaches it, as outside of the main thread."""
    monkeypatch.setattr(pipelines.curriculum, "claimed", lambda *_: contextlib.nullcontext(lambda: False))
    with pytest.raises(PipelineError, match=r"^stage chairs: another driver has taken it over"):
        driver.run()
    assert driver.ran == ["chairs"]
    assert not driver.registered


def test_other_weights_of_the_same_name_are_told_and_change_nothing(driver: Driver, tmp_path: Path, capsys):
    """A finished stage that is skipped says so; nobody would look for the old weights behind it."""
    start = tmp_path / "start.safetensors"
    first, other = (GMFlow(ModelConfig(**driver.workplace.config["model"]).build()) for _ in range(2))
    save_weights(first, start)
    driver.run(f"init_from={start}")
    driver.run(f"init_from={start}")
    assert "when it began" not in capsys.readouterr().out
    save_weights(other, start)
    driver.run(f"init_from={start}")
    told = capsys.readouterr().out
    assert f"stage=chairs starts from {start} (sha256 " in told
    assert f"what {start} was when it began; another name= starts from what it is now" in told
    start.unlink()
    driver.run(f"init_from={start}")
    assert "when it began" not in capsys.readouterr().out


def test_a_stage_that_begins_beside_another_of_its_name_says_so(driver: Driver, capsys):
    """Of a curriculum of weeks, a wrong override would otherwise begin again without a word."""
    driver.run()
    driver.run()
    assert " is new: " not in capsys.readouterr().out
    (chairs,) = (driver.workplace.folder / "storage").glob("tiny-chairs-*")
    driver.run("seed=8")
    assert (
        "stage=chairs is new: recipe, data, model, seed or start are not those of "
        f"{chairs.name}, which is left as it is"
    ) in capsys.readouterr().out


def test_what_killed_writers_left_in_a_stages_folder_goes(driver: Driver):
    driver.run()
    (chairs,) = (driver.workplace.folder / "storage").glob("tiny-chairs-*")
    (chairs / "result.json").unlink()
    left, busy = (chairs / "checkpoints" / f".step_{name}.pt.x.part" for name in ("old", "new"))
    left.parent.mkdir(exist_ok=True)
    for file in (left, busy):
        file.write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (two_days_ago, two_days_ago))
    driver.run()
    assert not left.exists()
    assert busy.exists()


def test_a_stage_that_has_just_been_trained_stops_at_its_gate_and_is_not_registered(driver: Driver):
    gate = "stages.chairs.gates=[{data: chairs, subset: val, below: 4.5}]"
    with pytest.raises(
        PipelineError, match=r"stage chairs: stopped at its gate: val/chairs/val/epe is 5\.000, not below"
    ):
        driver.run(gate)
    assert (driver.ran, driver.registered) == (["chairs"], [])
    storage = driver.workplace.folder / "storage"
    assert not list(storage.rglob("result.json"))
    assert len(list(storage.glob("tiny-chairs-*/final.safetensors"))) == 1, "its weights are kept"
    driver.records = driver.records[:-1]
    with pytest.raises(PipelineError, match="stage chairs: its gate val/chairs/val/epe has no value"):
        driver.run(gate)


def test_only_the_first_stage_starts_from_the_given_weights_the_next_from_what_it_ended_with(
    driver: Driver, tmp_path: Path
):
    torch.manual_seed(7)
    given = GMFlow(ModelConfig(**driver.workplace.config["model"]).build())
    save_weights(given, tmp_path / "given.safetensors")
    first, _ = driver.run(f"init_from={tmp_path / 'given.safetensors'}")
    assert driver.ran == ["chairs", "mix"]
    ended = load_file(first.weights.removeprefix("file://"))
    for start, expected in zip(driver.started_from, (given.state_dict(), ended), strict=True):
        assert all(torch.equal(start[name], tensor) for name, tensor in expected.items())


def test_workers_are_told_of_all_data_they_read_and_of_the_configs_seed_and_precision(driver: Driver):
    driver.run("seed=9", "precision=bf16")
    assert [(job.data, job.seed, job.precision) for job in driver.jobs] == [
        ({name: driver.workplace.config["data"][name] for name in names}, 9, "bf16")
        for names in (["chairs"], ["chairs", "kitti", "sintel"])
    ]


def test_what_an_attempt_that_was_killed_at_the_end_had_not_told_is_told(driver: Driver):
    first, _ = driver.run()
    client = MlflowClient(driver.workplace.tracking_uri)
    told = client.get_metric_history(first.mlflow_run, "train/loss")
    assert [(entry.step, entry.value) for entry in told] == [(2, 3.0), (40, 2.0)]
    assert [entry.step for entry in client.get_metric_history(first.mlflow_run, EPE)] == [40]


def test_the_lineage_says_on_what_the_figures_were_measured(driver: Driver):
    """Without it a figure of a few easy pairs dethrones the champion."""
    driver.run("stages.mix.validation.0.limit=2")
    version = Path(driver.workplace.config["data"]["chairs"]).stem.removeprefix("manifest-")
    assert [lineage.measured for lineage in driver.registered] == [
        {"chairs/val": version},
        {"chairs/val": f"{version}[:2]"},
    ]
    assert [lineage.parent for lineage in driver.registered] == ["random", "models:/gmflow/1"]
    assert [lineage.metrics for lineage in driver.registered] == [{EPE: 5.0}] * 2


def test_a_stage_ends_with_its_averaged_weights_and_without_figures_of_others(tmp_path: Path):
    config = ModelConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)
    torch.manual_seed(0)
    newest, mean = GMFlow(config.build()), GMFlow(config.build())
    # At the end the flow was not finite, so the validation found nothing: what it found before is of other weights.
    last = snapshot(newest, [(20, {EPE: 1.0, "train/loss": 9.0}), (40, {"train/loss": 2.0})])
    last["average"] = {"n_averaged": torch.tensor(3)} | {f"module.{n}": value for n, value in mean.state_dict().items()}
    metrics = final_weights(last, config, tmp_path / "w.safetensors")
    assert metrics == {"train/loss": 2.0}
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in mean.state_dict().items())


def test_random_weights_are_those_of_the_seed(tmp_path: Path):
    config = ModelConfig(backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)

    def start(name: str, seed: int) -> bytes:
        folder = open_store(str(tmp_path / name))
        assert provide_initial_weights(folder, config, seed, None, None) == "random"
        return folder.read("init.safetensors")

    assert start("a", 1) == start("b", 1) != start("c", 2)


def test_a_stage_that_another_mlflow_holds_is_said_and_registered_there_only_where_asked_for(driver: Driver):
    """Its version's name would lead to nothing, or to another model: a stage became its own parent."""
    driver.run()
    other = f"mlflow.tracking_uri=sqlite:///{driver.workplace.folder}/other.db"
    elsewhere = (
        r"stage chairs: finished and registered as models:/gmflow/1 in sqlite:///\S+/mlflow\.db, of which sqlite"
    )
    with pytest.raises(PipelineError, match=elsewhere) as told:
        driver.run(other)
    (named,) = re.findall(r"delete (\S+/result\.json)", str(told.value))
    Path(named.removeprefix("file://")).unlink()
    with pytest.raises(PipelineError, match="stage mix: finished and registered as models:/gmflow/2"):
        driver.run(other)
    assert driver.ran == ["chairs", "mix", "chairs"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stage": "chairs"}', None])
def test_a_damaged_result_is_said_with_the_way_out(driver: Driver, content: str | None):
    driver.run("only=[chairs]")
    (result,) = (driver.workplace.folder / "storage").glob("tiny-chairs-*/result.json")
    if content is None:
        result.with_name("final.safetensors").unlink()
    else:
        result.write_text(content)
    problem = "result.json is damaged" if content is not None else "final.safetensors is gone"
    with pytest.raises(
        PipelineError, match=rf"stage chairs: .*{problem}.*delete {result.as_uri()}, and the same command"
    ):
        driver.run("only=[chairs]")
    result.unlink()
    assert [found.stage for found in driver.run("only=[chairs]")] == ["chairs"]


def test_a_stage_that_was_finished_before_results_named_their_mlflow_is_found(driver: Driver):
    (before,) = driver.run("only=[chairs]")
    (path,) = (driver.workplace.folder / "storage").glob("tiny-chairs-*/result.json")
    content = json.loads(path.read_text())
    del content["mlflow"]
    path.write_text(json.dumps(content))
    (found,) = driver.run("only=[chairs]")
    assert (found.model, driver.ran) == (before.model, ["chairs"])
