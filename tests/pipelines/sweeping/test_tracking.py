"""What MLflow and the registry have of a sweep."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store
from gmflow import GMFlow, GMFlowConfig, save_weights
from pipelines.claim import CLAIM
from pipelines.sweep import plan_trials, register_best, sweep_mark
from pipelines.sweeping.accuracy import Weights, score_jobs
from pipelines.sweeping.pinned_weights import pinned_weights
from pipelines.sweeping.table import Row
from pipelines.sweeping.tracking import SweepRun
from pipelines.sweeping.trials import (
    TrialPlan,
    TrialRecords,
    TrialResult,
    announce,
    announced,
    listed_points,
    retry_failed,
)
from pipelines.training import mlflow_client, model_versions, registration
from pipelines.training.plan import FINAL_WEIGHTS
from tests.pipelines.sweeping.made import MANIFESTS, METRIC, REFINE, TINY, row


def test_costs_that_were_measured_again_are_the_ones_mlflow_shows(tree, load, tmp_path):
    config = load(tree, f"mlflow={{tracking_uri: 'sqlite:///{tmp_path}/mlflow.db'}}")
    for latency in (120.0, 40.0):
        run = SweepRun(config, None, {}, print)
        run.judge(row("2x8-r4-p1", 1.0, latency, 1.0))
        time.sleep(0.002)  # MLflow's clock ticks in milliseconds
    assert run.client.get_run(run.child(row("2x8-r4-p1", 1.0, 1.0, 1.0)).run_id).data.metrics["latency_ms"] == 40


def test_a_sweep_goes_on_with_what_its_alias_was_when_it_began(tracked, tmp_path, capsys):
    client = mlflow_client.connect(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("gmflow")
    for number in ("1", "2"):
        torch.manual_seed(int(number))
        (tmp_path / number).mkdir()
        model = GMFlow(GMFlowConfig.from_dict(REFINE.to_dict() | TINY))
        save_weights(model, tmp_path / number / "w.safetensors")
        client.create_model_version("gmflow", (tmp_path / number).as_uri())

    def begin(*overrides: str) -> tuple[Weights, TrialPlan, list[str], str]:
        """What a run works with: weights, trials, the files of the probe's figures, the run in MLflow."""
        sweep = tracked("weights=models:/gmflow@champion", *overrides)
        weights = pinned_weights(sweep.config, sweep.store, sweep.view.say)
        (chosen,) = sweep.config.probe.validation
        jobs = score_jobs(weights, sweep.config.probed, chosen, MANIFESTS["chairs"], "fp32")
        scores = [job.key(setting) for job in jobs for setting in job.settings]
        return weights, plan_trials(sweep, weights), scores, SweepRun(sweep.config, weights, {}, print).run_id

    client.set_registered_model_alias("gmflow", "champion", "1")
    weights, plan, scores, run_id = begin()
    assert weights.source == "models:/gmflow/1"
    assert capsys.readouterr().out == ""
    trial = plan.trial(listed_points(plan.config, [])[0])
    announce(trial, 0)
    TrialRecords.open(trial.folder).end(TrialResult("failed", "no luck"))

    def moves() -> None:
        client.set_registered_model_alias("gmflow", "champion", "2")

    def goes() -> None:
        client.delete_registered_model_alias("gmflow", "champion")

    moved = "goes on with models:/gmflow/1, what models:/gmflow@champion was when"
    for alias, told in ((moves, moved), (goes, "")):  # of what cannot be looked up nothing is known
        alias()
        again, plan, *found = begin()
        assert (again, found) == (weights, [scores, run_id])
        assert [known.key for known in announced(plan)] == [trial.key]
        said = capsys.readouterr().out
        assert told in said
        assert bool(said) == bool(told)
    assert retry_failed(plan) == 1

    moves()
    afresh, plan, *found = begin("name=other")
    assert afresh.source == "models:/gmflow/2"
    assert announced(plan) == []
    assert not {run_id, *scores} & {found[1], *found[0]}


def test_a_sweep_continued_with_more_trials_is_the_same_in_mlflow(tracked, tmp_path):
    weights = Weights("w.safetensors", "v", "models:/gmflow/1")
    longer = ["tune.trials=8", "tune.max_concurrent=1", "tune.machine={num_workers: 2}", "tune.reduction_factor=2"]
    longer += ["probe.cpus=2", "probe.use_gpu=true", "probe.grid.corr_radius=[2, 3, 5]", "cost.rounds=9"]
    seen = []
    for overrides in (["tune.trials=4"], longer):
        sweep = tracked(*overrides)
        run = SweepRun(sweep.config, weights, MANIFESTS, print)
        plan = plan_trials(sweep, weights)
        trial = plan.trial(listed_points(plan.config, [])[0])
        best = Row(trial.name, "trial", trial.key, trial.model.build(), "finished", metrics={METRIC: 2.0})
        with run.parent.running(run.run_id):
            run.end(best)
            run.end(row("2x8-r4-p1", 1.0, 1.0, 1.0))
        if not seen:
            save_weights(GMFlow(trial.model.build()), tmp_path / "final.safetensors")
            open_store(trial.folder).upload(tmp_path / "final.safetensors", FINAL_WEIGHTS)
        register_best(sweep, [best], run, plan)
        (version,) = run.client.search_model_versions("name = 'gmflow'")
        assert version.tags["parent"] == "models:/gmflow/1"
        found = run.client.search_runs([run.parent.experiment_id])
        seen.append({one.info.run_id: one.data.tags.get("mlflow.parentRunId") for one in found})
        assert {one.info.status for one in found} == {"FINISHED"}
    assert seen[0] == seen[1]
    assert list(seen[0].values()).count(run.run_id) == 2


def test_a_sweep_whose_folder_was_deleted_is_another_in_mlflow(tracked, tmp_path):
    """Otherwise the figures of what is trained anew, by other code, would be left out: MLflow has those steps."""

    def runs(store: ObjectStore) -> tuple[str, str]:
        config = tracked().config
        run = SweepRun(config, None, MANIFESTS, print, begun=sweep_mark(store))
        return run.run_id, run.child(row("2x8-r4-p1", 1.0, 1.0, 1.0)).run_id

    folder, earlier = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    folder.write(CLAIM, b"")
    first = runs(folder)
    assert runs(folder) == first
    shutil.rmtree(tmp_path / "a")
    anew = runs(folder)
    assert not set(anew) & set(first)
    earlier.write("trials/x/trial.json", b"{}")
    assert sweep_mark(earlier) == ""
    assert not set(runs(earlier)) & {*anew, *first}


def test_a_trial_that_a_changed_sweep_still_has_moves_to_it_and_others_are_others(tracked):
    weights = Weights("w.safetensors", "v", "w.pth (sha256 v)")
    children = []
    for overrides in (["probe=null"], [], ["tune.stage.steps=40"]):
        sweep = tracked(*overrides)
        plan = plan_trials(sweep, weights)
        trial = plan.trial(listed_points(plan.config, [])[0])
        run = SweepRun(sweep.config, weights, MANIFESTS, print)
        child = run.child(Row(trial.name, "trial", trial.key, trial.model.build()))
        assert run.client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == run.run_id
        children.append((run.run_id, child.run_id))
    (first, shared), (second, same), (_, other) = children
    assert first != second
    assert shared == same != other


def test_of_several_registered_trials_the_best_is_the_last_and_has_the_alias(tracked, tmp_path, monkeypatch):
    sweep = tracked("registration.best=2")
    found = Weights("w.safetensors", "v", "w.pth")
    plan = plan_trials(sweep, found)
    rows = []
    for epe, point in zip((2.0, 1.0, 3.0), listed_points(plan.config, []), strict=False):
        trial = plan.trial(point)
        open_store(trial.folder).write(FINAL_WEIGHTS, b"w")
        rows.append(Row(trial.name, "trial", trial.key, trial.model.build(), "finished", metrics={METRIC: epe}))
    told = []

    def register(client: Any, name: str, run_id: str, path: Path, lineage: registration.Lineage, rule: Any) -> Any:
        told.append((lineage.metrics[METRIC], lineage.stage, lineage.measured))
        return SimpleNamespace(name=name, version="1")

    monkeypatch.setattr(registration, "register", register)
    monkeypatch.setattr(registration, "standing", lambda client, version, rule: model_versions.numbered(version))
    run: Any = SimpleNamespace(
        client=None,
        parent=SimpleNamespace(patience=lambda work, *a: work(*a)),
        child=lambda one: SimpleNamespace(run_id=one.name),
    )
    register_best(sweep, [*rows, replace(rows[0], status="stopped", metrics={METRIC: 0.1})], run, plan)
    assert [epe for epe, _, _ in told] == [2.0, 1.0]
    assert {stage for _, stage, _ in told} == {"small"}


def test_a_sweep_of_another_precision_or_stage_is_another_run(tracked):
    found = {
        SweepRun(tracked(*overrides).config, None, MANIFESTS, print).run_id
        for overrides in ([], ["precision=bf16"], ["tune.stage.steps=40"])
    }
    assert len(found) == 3


def test_trials_from_random_weights_take_none(tracked):
    assert plan_trials(tracked("tune.start=random"), Weights("w", "v", "w.pth")).weights is None
