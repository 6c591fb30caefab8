"""The sweep without Ray: which settings are valid, in which order trials come, what is on the front."""

import csv
import io
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError
from ray.tune.search import Searcher

from datasets_etl.errors import DamagedError, DataError
from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from gmflow import GMFlow, GMFlowConfig, execution, save_weights
from gmflow.errors import GMFlowError
from gmflow.execution import ExecutionConfig, Precision, prepare_model, runs_in
from gmflow.predict import padded_flow
from pipelines.claim import CLAIM
from pipelines.config_file import load_config
from pipelines.errors import PipelineError
from pipelines.sweep import Sweep, beginning_of_sweep, keep_weights, plan_trials, prepare, register_best
from pipelines.sweeping import accuracy, cost, plots, tuning
from pipelines.sweeping.accuracy import SharedFeatures, Weights, score_jobs
from pipelines.sweeping.config import CostConfig, SweepConfig
from pipelines.sweeping.cost import Cost, _allocated_on_cpu
from pipelines.sweeping.room import check_room, concurrent_trials, drivers_at_once, told_of_drivers
from pipelines.sweeping.settings import Setting, check_crop, check_size, grid_settings, padded_size
from pipelines.sweeping.table import Row, best_settings, mark_front, to_csv, to_json
from pipelines.sweeping.tracking import SweepRun
from pipelines.sweeping.trials import (
    Trial,
    TrialPlan,
    TrialRecords,
    TrialResult,
    announce,
    announced,
    listed_points,
    retry_failed,
)
from pipelines.sweeping.tuning import DistinctOptuna
from pipelines.sweeping.view import SweepView
from pipelines.training import mlflow_client, registry
from pipelines.training.config import SetConfig
from pipelines.training.plan import FINAL_WEIGHTS
from tests.conftest import ROOT

REFINE = GMFlowConfig.refine()
METRIC = "val/chairs/val/epe"


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    stage = {"name": "chairs", "steps": 30, "global_batch": 4, "peak_lr": 1e-4, "crop": [64, 96], "validate_every": 10}
    stage |= {"mixture": [{"data": "chairs", "subset": "train"}], "validation": [{"data": "chairs", "subset": "val"}]}
    return {
        "name": "small",
        "storage": str(tmp_path),
        "data": {"chairs": "c.json"},
        "weights": "w.pth",
        "objective": {"data": "chairs", "subset": "val"},
        "probe": {
            "grid": {"attn_splits": [[1, 2], [4, 8]], "corr_radius": [2, 3]},
            "validation": [{"data": "chairs", "subset": "val"}],
        },
        "tune": {"stage": stage, "space": {"attn_splits": [[1, 2], [4, 8]], "corr_radius": [2, 3]}},
    }


@pytest.fixture
def load(tmp_path: Path):
    def _load(tree: dict[str, Any], *overrides: str) -> SweepConfig:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(SweepConfig, str(path), overrides)

    return _load


def runs(model: GMFlowConfig, size: tuple[int, int]) -> bool:
    """Whether the model itself takes images of this size, with whole windows of two feature pixels at least."""
    try:
        GMFlow(model)._check(torch.zeros(1, 3, *size), torch.zeros(1, 3, *size))
    except GMFlowError:
        return False
    return all(min(size) // s // k >= 2 for s, k in zip(model.strides, model.attn_splits, strict=True))


@pytest.mark.parametrize("scale", [0, 1])
def test_a_crops_valid_splits_are_those_the_model_takes(scale):
    crop = (96, 160)
    tiny = {"backbone_channels": (4, 4, 4), "feature_channels": 4, "num_layers": 1}
    taken = []
    for splits in range(1, 30):
        pair = (splits, 1) if scale == 0 else (1, splits)
        if runs(replace(REFINE, attn_splits=pair, **tiny), crop):
            taken.append(splits)
    with pytest.raises(PipelineError, match=r"crop 96×160") as error:
        check_crop(replace(REFINE, attn_splits=(7, 1) if scale == 0 else (1, 7)), crop, "here")
    listed = str(error.value).rpartition("valid are ")[2]
    assert [int(value) for value in listed.split(", ")] == taken
    for splits in taken:
        check_crop(replace(REFINE, attn_splits=(splits, 1) if scale == 0 else (1, splits)), crop, "here")


@settings(deadline=None)  # a shared machine is no reason to fail
@given(st.tuples(st.integers(1, 20), st.integers(1, 40)), st.tuples(st.integers(40, 500), st.integers(40, 1300)))
def test_an_evaluated_size_is_refused_with_splits_that_are_then_accepted(splits, size):
    model = replace(REFINE, attn_splits=splits, corr_radius=(-1, 1))
    try:
        check_size(model, size, "here")
    except PipelineError as error:
        scale = int(re.search(r"at scale (\d)", str(error))[1]) - 1
        listed = str(error).rpartition("at the other scale are ")[2]
        for valid in [] if listed == "none" else listed.split(", "):
            pair = list(splits)
            pair[scale] = int(valid)
            padded = padded_size(replace(model, attn_splits=tuple(pair)), size)
            window = [length // pair[scale] for length in padded]
            assert all(p - s < w for p, s, w in zip(padded, size, window, strict=True))
        return
    padded = padded_size(model, size)
    assert not any(length % model.size_multiple for length in padded)
    assert all(p - s < p // k for k in splits for p, s in zip(padded, size, strict=True))


def test_sintels_usual_windows_are_valid_and_absurd_ones_are_not():
    for splits in ((1, 2), (2, 8), (4, 16)):
        check_size(replace(REFINE, attn_splits=splits), (436, 1024), "here")
    assert padded_size(REFINE, (436, 1024)) == (448, 1024)
    with pytest.raises(PipelineError, match=r"attn_splits 16 at scale 1 .* padded to 512×1024"):
        check_size(replace(REFINE, attn_splits=(16, 8)), (436, 1024), "here")


@pytest.mark.parametrize("radius", [4, 99])
def test_a_radius_larger_than_the_map_names_the_largest(radius):
    with pytest.raises(PipelineError, match=rf"corr_radius {radius} makes no sense at scale 2; valid are 1 to 3"):
        check_crop(replace(REFINE, attn_splits=(1, 2), corr_radius=(-1, radius)), (32, 48), "here")
    check_crop(replace(REFINE, attn_splits=(1, 2), corr_radius=(-1, 3)), (32, 48), "here")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["tune.space.attn_splits=[[3],[8]]"], r"attn_splits 3 at scale 1 .* 8×12 of crop 64×96 .* valid are 1, 2, 4"),
        (["tune.space.attn_splits=[[2]]"], r"tune.space.attn_splits holds 1 list\(s\); this model has 2 scale"),
        (
            ["probe.grid.corr_radius=[0, 3]"],
            r"probe.grid.corr_radius: 0 makes no sense; valid are whole numbers from 1",
        ),
        (["probe.grid.corr_radius=[-1]"], r"corr_radius: -1 makes no sense"),
        (["model.variant=base", "probe.grid.attn_splits=[[2]]"], "a model of one scale matches globally"),
        (["tune.space.num_layers=[2, 4]"], r"change the weights' layout.* set tune.start=random"),
        (["tune.searcher=random"], "trials is missing"),
        (["tune.space.peak_lr={low: 1e-5, high: 1e-4}"], "a grid needs values"),
        (["tune.stage.validate_every=30"], "asha stops nothing"),
        (["tune.stage.validation=[{data: chairs, subset: val, limit: 2}]"], r"of chairs/val.*\(all / first 2 pairs\)"),
        (["tune.stage.validation=[{data: chairs, subset: val, only: ['0*']}]"], r"of chairs/val.*\(all / only 0\*\)"),
        (["seed=9223372036854775808"], "seed"),
        (
            ["tune.stage.gates=[{data: chairs, subset: val, metric: epe, below: 5}]"],
            "stage.gates: nothing is built on a trial",
        ),
        (["objective.subset=train"], r"probe.validation lacks chairs/train, the objective"),
        (["weights=null"], "which model is probed"),
        (["probe.gird={}"], "unknown key probe.gird; did you mean grid"),
        (["tune.machine.num_workers=5"], "cannot feed"),
        (["cost={use_gpu: true, clock: cpu}"], "tells nothing of a GPU"),
    ],
)
def test_a_wrong_config_is_refused_with_the_way_out(tree, load, overrides, complaint):
    load(tree)
    with pytest.raises(PipelineError, match=complaint):
        load(tree, *overrides)


@pytest.mark.parametrize("file", ["sweep.yaml", "sweep_demo.yaml"])
def test_the_ready_configs_are_valid(file):
    urls = [f"data.{name}=URL" for name in ("sintel", "things", "kitti", "chairs")]
    config = load_config(SweepConfig, str(ROOT / "pipelines" / "configs" / file), [*urls, "weights=w.pth"])
    assert config.tune is not None
    held_out = {(part.data, part.without) for part in config.tune.stage.mixture if part.without}
    assert {(chosen.data, chosen.only) for chosen in config.tune.stage.validation if chosen.only} == held_out
    if config.probe is not None:
        assert {(chosen.data, chosen.only) for chosen in config.probe.validation} == held_out
        assert config.reference == Setting((2, 8), (-1, 4), (-1, 1))
        assert config.reference in config.probed


def test_the_grid_is_every_combination_and_holds_the_reference(tree, load):
    probed = load(tree).probed
    assert len(probed) == 9  # 2 × 2 × 2, and the reference, whose radius 4 is not in the grid
    assert len(set(probed)) == 9
    assert probed[-1] == Setting.of(REFINE)
    assert probed[:8] == grid_settings(Setting.of(REFINE), [[1, 2], [4, 8]], [2, 3], None)


def plan_of(config: SweepConfig) -> TrialPlan:
    return TrialPlan(config, None, {"chairs": "c.json"}, {"chairs": "v1"}, f"{config.storage}/trials", "feed")


def test_a_trials_name_follows_from_what_decides_it(tree, load):
    plan = plan_of(load(tree))
    point = {"attn_splits_1": 1, "attn_splits_2": 4, "corr_radius": 3}
    trial = plan.trial(point)
    assert plan.trial(dict(reversed(point.items()))) == replace(trial, point=dict(point))
    assert trial.model.build().attn_splits == (1, 4)
    assert trial.model.build().corr_radius == (-1, 3)
    others = [
        plan.trial(point | {"corr_radius": 2}),
        plan_of(load(tree, "seed=1")).trial(point),
        plan_of(load(tree, "tune.stage.steps=40")).trial(point),
        replace(plan, versions={"chairs": "v2"}).trial(point),
    ]
    assert len({trial.key, *(other.key for other in others)}) == 5
    same = plan_of(load(tree, "tune.machine.num_workers=2", "tune.max_concurrent=1", "storage=/elsewhere"))
    assert same.trial(point).key == trial.key


def test_seeds_come_first_and_nothing_is_lost(tree, load):
    config = load(tree)
    seeds = [Setting((2, 4), (-1, 3), (-1, 1)), Setting((1, 16), (-1, 3), (-1, 1)), Setting((1, 8), (-1, 2), (-1, 1))]
    points = listed_points(config, seeds)
    assert points[:2] == [
        {"attn_splits_1": 2, "attn_splits_2": 4, "corr_radius": 3},
        {"attn_splits_1": 1, "attn_splits_2": 8, "corr_radius": 2},
    ]
    assert sorted(map(str, points)) == sorted(map(str, listed_points(config, [])))
    assert len(points) == 8


@pytest.mark.parametrize("searcher", ["grid", "random"])
def test_what_was_tried_stays_in_the_list_whatever_the_seeds_are_now(tree, load, searcher):
    """Seeds follow from measured costs: on another machine, or with another torch, they may be others."""
    config = load(tree, f"tune.searcher={searcher}", "tune.trials=3")
    seeds = [Setting((2, 4), (-1, 3), (-1, 1)), Setting((1, 8), (-1, 2), (-1, 1))]
    known = listed_points(config, seeds)
    again = listed_points(config, [Setting((2, 8), (-1, 2), (-1, 1))], known)
    assert sorted(map(str, again)) == sorted(map(str, known))
    more = listed_points(load(tree, f"tune.searcher={searcher}", "tune.trials=4"), seeds[:0], known)
    assert [point for point in more if point in known] == more[:3]
    assert len({str(point) for point in more}) == 4


def test_random_points_are_distinct_inside_the_space_and_the_same_every_time(tree, load):
    overrides = ["tune.searcher=random", "tune.trials=20", "tune.space.peak_lr={low: 1e-5, high: 1e-3}"]
    config = load(tree, *overrides)
    seed = Setting((1, 8), (-1, 3), (-1, 1))
    points = listed_points(config, [seed])
    assert points == listed_points(config, [seed])
    assert points != listed_points(load(tree, *overrides, "seed=5"), [seed])
    assert len({json.dumps(point) for point in points}) == 20
    assert points[0] == {"attn_splits_1": 1, "attn_splits_2": 8, "corr_radius": 3, "peak_lr": 1e-4}
    rates = [point["peak_lr"] for point in points]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert min(rates) < 5e-5 < 2e-4 < max(rates)
    finite = load(tree, "tune.searcher=random", "tune.trials=50")
    assert len(listed_points(finite, [])) == 8  # there are no more


def test_optuna_begins_with_the_given_points_and_never_repeats_one(tree, load):
    plan = plan_of(load(tree, "tune.searcher=optuna", "tune.trials=8"))
    first = [{"attn_splits_1": 2, "attn_splits_2": 8, "corr_radius": 3}]
    searcher = DistinctOptuna(plan, first, 0)
    found = []
    while isinstance(suggested := searcher.suggest(str(len(found))), dict):
        found.append(suggested["point"])
        searcher.on_trial_complete(str(len(found) - 1), {"objective": float(len(found)), "training_iteration": 1})
    assert suggested == Searcher.FINISHED
    assert found[0] == first[0]
    assert len({json.dumps(point, sort_keys=True) for point in found}) == len(found) == 8  # all there are

    ranged = plan_of(load(tree, "tune.searcher=optuna", "tune.trials=8", "tune.space.peak_lr={low: 1e-5, high: 1e-3}"))
    draws = [DistinctOptuna(ranged, [], drawn).suggest("a")["point"] for drawn in (0, 0, 4)]
    assert draws[0] == draws[1] != draws[2]  # a continued search does not draw the same again
    assert 1e-5 <= draws[0]["peak_lr"] <= 1e-3
    assert ranged.trial(draws[0]).stage.peak_lr == draws[0]["peak_lr"]


def test_storage_remembers_trials_in_order_and_only_those_of_the_config(tree, load):
    plan = plan_of(load(tree))
    points = listed_points(plan.config, [])
    for number, point in enumerate(points[:3]):
        announce(plan.trial(point), 2 - number)
    assert [trial.point for trial in announced(plan)] == points[2::-1]
    assert announced(plan_of(load(tree, "seed=9"))) == []
    narrowed = [value for value in (2, 3) if value != points[0]["corr_radius"]]
    left = announced(plan_of(load(tree, f"tune.space.corr_radius={narrowed}")))
    assert [trial.point for trial in left] == [p for p in points[2::-1] if p["corr_radius"] in narrowed]

    records = TrialRecords.open(plan.trial(points[0]).folder)
    records.add(10, {METRIC: 3.0})
    records.end(TrialResult("failed", "no luck", 10))
    again = TrialRecords.open(plan.trial(points[0]).folder)
    assert (again.history, again.result) == ([(10, {METRIC: 3.0})], TrialResult("failed", "no luck", 10))
    TrialRecords.open(plan.trial(points[1]).folder).end(TrialResult("finished", "", 30))
    assert retry_failed(plan) == 1
    retried = TrialRecords.open(plan.trial(points[0]).folder)
    assert retried.result is None
    assert retried.end(TrialResult("finished", "", 30)) == retried.result == TrialResult("finished", "", 30)
    assert TrialRecords.open(plan.trial(points[1]).folder).result == TrialResult("finished", "", 30)


@pytest.mark.parametrize(
    ("died_of", "kept"),
    [
        (ActorDiedError(), None),  # its controller: tried again by the same command
        (DataError("storage is away"), None),
        (PipelineError("no luck"), TrialResult("failed", "no luck")),
        (DamagedError("s3://x: damaged"), TrialResult("failed", "s3://x: damaged")),
    ],
)
def test_a_trial_fails_only_by_its_own_fault(tree, load, monkeypatch, died_of, kept):
    def die(trial: Trial, plan: TrialPlan) -> None:
        raise died_of

    monkeypatch.setattr(tuning, "_train", die)
    plan = plan_of(load(tree))
    point = listed_points(plan.config, [])[0]
    with pytest.raises(type(died_of)):
        tuning.run_trial({"point": point}, plan)
    assert TrialRecords.open(plan.trial(point).folder).result == kept


def test_a_trials_driver_waits_for_storage_as_its_workers_do(tree, load, monkeypatch):
    waits = []

    def look(trial: Trial, plan: TrialPlan) -> None:
        waits.append(os.environ[PATIENCE_VARIABLE])
        raise ActorDiedError

    monkeypatch.setattr(tuning, "_train", look)
    plan = plan_of(load(tree, "tune.machine={storage_patience_s: 33}"))
    with pytest.raises(ActorDiedError):
        tuning.run_trial({"point": listed_points(plan.config, [])[0]}, plan)
    assert waits == ["33.0"]


def test_a_probes_task_waits_for_storage_as_the_sweep_does(tree, load, monkeypatch):
    """On another machine, or in a process that Ray started before, it has not the driver's environment."""
    config = load(tree, "tune.machine={storage_patience_s: 33}")
    waits = []
    monkeypatch.setattr(accuracy, "_scores", lambda job, device: waits.append(os.environ[PATIENCE_VARIABLE]))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    accuracy.score_settings._function(None, config.probe, config.storage_patience_s)
    assert waits == ["33.0"]


def test_a_validation_that_storage_missed_is_made_up_for_in_its_place(tree, load):
    plan = plan_of(load(tree))
    trial = plan.trial(listed_points(plan.config, [])[0])
    told = {10: 3.0, 20: 2.0, 30: 1.0}
    TrialRecords.open(trial.folder).add(20, {METRIC: told[20]})
    records = [(step, {METRIC: epe, "train/loss": 1.0}) for step, epe in told.items()]
    tuning._catch_up(trial, plan, {"records": [*records, (15, {"train/loss": 9.0})]})
    assert TrialRecords.open(trial.folder).history == [(step, {METRIC: epe}) for step, epe in told.items()]


def test_a_trial_that_was_stopped_stays_so_whatever_its_driver_still_meets(tree, load, monkeypatch):
    """Tune decides, and only then ends the processes, of which the driver is not the first."""
    plan = plan_of(load(tree))
    point = listed_points(plan.config, [])[0]
    stopped = TrialResult("stopped", "behind the others at step 20", 20)

    def stop(trial: Trial, plan: TrialPlan) -> None:
        TrialRecords.open(trial.folder).end(stopped)
        raise PipelineError("ended without a new checkpoint")

    monkeypatch.setattr(tuning, "_train", stop)
    with pytest.raises(PipelineError):
        tuning.run_trial({"point": point}, plan)
    assert TrialRecords.open(plan.trial(point).folder).result == stopped


def test_no_more_trials_run_at_once_than_the_cluster_holds(tree, load):
    pairs = load(tree, "tune.machine={num_workers: 2, cpus_per_worker: 3}")
    assert concurrent_trials(pairs, [{"CPU": 12.0}]) == 2
    assert concurrent_trials(pairs, [{"CPU": 5.0}, {"CPU": 5.0}, {"CPU": 5.0}]) == 1  # 1 worker a node; not 15 / 6 = 2
    with pytest.raises(PipelineError, match=r"2 worker\(s\) with 3 CPU\(s\) each; the cluster has room for 1"):
        concurrent_trials(pairs, [{"CPU": 5.0}])
    apart = load(tree, "tune.machine={num_workers: 2, placement: strict_spread}")
    assert concurrent_trials(apart, [{"CPU": 8.0}, {"CPU": 8.0}]) == 1
    with pytest.raises(PipelineError, match=r"each on a node of its own; the cluster has room for 1\."):
        concurrent_trials(apart, [{"CPU": 8.0}])
    gpu = load(tree, "tune.machine={num_workers: 1, use_gpu: true}")
    assert concurrent_trials(gpu, [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}]) == 2


def test_as_many_trials_run_as_are_asked_for_where_they_fit_or_machines_come(tree, load):
    asked = load(tree, "tune.max_concurrent=3")
    assert [concurrent_trials(asked, [{"CPU": cpus}]) for cpus in (1.0, 8.0)] == [1, 3]
    with pytest.raises(PipelineError, match="the cluster has room for 0"):
        concurrent_trials(asked, [{"CPU": 0.0}])
    assert concurrent_trials(load(tree, "tune.max_concurrent=3", "cluster_grows=true"), [{"CPU": 0.0}]) == 3


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["probe.cpus=4"], r"probe: no node of the cluster has 4 CPU\(s\); lower probe.cpus"),
        (["cost={cpus: 1, use_gpu: true}"], r"cost: no node of the cluster has 1 CPU\(s\) and a GPU"),
        (["tune.machine={num_workers: 4}"], r"the cluster has room for 3"),
    ],
)
def test_what_never_fits_is_said_before_anything_starts(tree, load, overrides, complaint):
    nodes = [{"CPU": 2.0}, {"CPU": 1.0}]
    check_room(load(tree), nodes)
    with pytest.raises(PipelineError, match=complaint):
        check_room(load(tree, *overrides), nodes)


def test_a_cluster_that_grows_may_have_no_room_yet(tree, load):
    check_room(load(tree, "cluster_grows=true", "tune.max_concurrent=2"), [{"memory": 1e9}])
    with pytest.raises(PipelineError, match="cluster_grows=true"):
        check_room(load(tree), [{"memory": 1e9}])
    with pytest.raises(PipelineError, match=r"tune\.max_concurrent is missing"):
        load(tree, "cluster_grows=true")


def row(name: str, epe: float, latency: float, memory: float, **more: Any) -> Row:
    costs = Cost(latency, memory)
    return Row(name, "probe", f"key of {name}", REFINE, "finished", metrics={METRIC: epe}, cost=costs, **more)


def test_costs_that_were_measured_again_are_the_ones_mlflow_shows(tree, load, tmp_path):
    config = load(tree, f"mlflow={{tracking_uri: 'sqlite:///{tmp_path}/mlflow.db'}}")
    for latency in (120.0, 40.0):
        run = SweepRun(config, None, {}, print)
        run.judge(row("2x8-r4-p1", 1.0, latency, 1.0))
        time.sleep(0.002)  # MLflow's clock ticks in milliseconds
    assert run.client.get_run(run.child(row("2x8-r4-p1", 1.0, 1.0, 1.0)).run_id).data.metrics["latency_ms"] == 40


TINY = {"backbone_channels": [8, 8, 8], "feature_channels": 16, "num_layers": 1}
MANIFESTS: Any = {"chairs": SimpleNamespace(url="c.json", version="v1")}


@pytest.fixture
def tracked(tree, load, tmp_path):
    """Makes a sweep of a tiny model, tracked in a database of its own."""
    tree |= {"model": {"variant": "refine", **TINY}, "registration": {"best": 1}}
    tree |= {"mlflow": {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}}

    def _tracked(*overrides: str) -> Sweep:
        config = load(tree, *overrides)
        store = open_store(f"{config.storage}/{config.name}")
        return Sweep(config, MANIFESTS, store, SweepView(config.metric))

    return _tracked


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
        weights = keep_weights(sweep)
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


def test_as_many_trials_run_as_their_drivers_fit_beside_the_sweeps():
    assert drivers_at_once({"CPU": 0.0, "memory": 7.9 * 2**30}) == 5
    assert drivers_at_once({"memory": 2.0**29}) == 1


def test_fewer_trials_at_once_than_asked_for_are_told(tree, load):
    config = load(tree, "tune.max_concurrent=4")
    cluster = [{"CPU": 8.0}]
    assert told_of_drivers(config, cluster, {"memory": 6.0 * 2**30}) == ""
    told = told_of_drivers(config, cluster, {"memory": 5.9 * 2**30})
    assert told.startswith("runs 3 trial(s) at once, not 4: their drivers run on this node, which has 5.9 GiB")


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
        run = SweepRun(config, None, MANIFESTS, print, begun=beginning_of_sweep(store))
        return run.run_id, run.child(row("2x8-r4-p1", 1.0, 1.0, 1.0)).run_id

    folder, earlier = open_store(str(tmp_path / "a")), open_store(str(tmp_path / "b"))
    folder.write(CLAIM, b"")
    first = runs(folder)
    assert runs(folder) == first
    shutil.rmtree(tmp_path / "a")
    anew = runs(folder)
    assert not set(anew) & set(first)
    earlier.write("trials/x/trial.json", b"{}")
    assert beginning_of_sweep(earlier) == ""
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


@settings(deadline=None)  # a shared machine is no reason to fail
@given(st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=12))
def test_the_front_holds_what_nothing_beats_and_something_on_it_beats_the_rest(goals):
    rows = mark_front([row(str(number), *map(float, found)) for number, found in enumerate(goals)], METRIC)
    front = [found for found, marked in zip(goals, rows, strict=True) if marked.front]
    assert front
    for found, marked in zip(goals, rows, strict=True):
        beaten = [b for b in goals if all(np.less_equal(b, found)) and any(np.less(b, found))]
        assert marked.front == (not beaten)
        assert marked.front or any(b in front for b in beaten)


def test_costs_closer_than_a_percent_are_the_same_cost():
    rows = mark_front(
        [row("better", 1.0, 100.2, 50.1), row("worse", 1.1, 100.0, 50.0), row("fast", 1.2, 90, 50)], METRIC
    )
    assert [one.front for one in rows] == [True, False, True]


def test_the_front_takes_only_what_was_measured_to_the_end():
    best = row("stopped", 0.1, 1, 1)
    rows = [replace(best, status="stopped"), replace(best, cost=None), replace(best, metrics={}), row("only", 5, 9, 9)]
    assert [one.front for one in mark_front(rows, METRIC)] == [False, False, False, True]


def test_the_probes_best_are_the_fronts_by_objective():
    other = replace(REFINE, attn_splits=(1, 4))
    rows = mark_front([row("slow", 1, 9, 1), replace(row("fast", 2, 3, 1), model=other), row("bad", 3, 9, 9)], METRIC)
    assert best_settings(rows, METRIC, 5) == [Setting.of(REFINE), Setting.of(other)]
    assert best_settings(rows, METRIC, 1) == [Setting.of(REFINE)]


def test_the_report_holds_every_row_and_needs_no_network():
    failed = Row("broken", "trial", "k", REFINE, "failed", reason="loss is </script> nan", choices={"peak_lr": 0.1})
    rows = [*mark_front([row("a", 1, 9, 1), row("b", 2, 3, 1, reference=True)], METRIC), failed]
    lines = list(csv.DictReader(io.StringIO(to_csv(rows, (436, 1024)).decode())))
    assert [line["name"] for line in lines] == ["a", "b", "broken"]
    assert [line["peak_lr"] for line in lines] == ["", "", "0.1"]
    assert [line["reference"] for line in lines] == ["False", "True", "False"]
    assert lines[2]["reason"] == failed.reason
    assert lines[0][METRIC] == "1"
    assert lines[0]["cost_padded_to"] == "448x1024"
    assert json.loads(to_json(rows, METRIC, {"height": 436, "width": 1024}))["rows"][0]["latency_ms"] == 9
    page = plots.front_html(rows, METRIC, (436, 1024), "x").decode()
    assert page.count("</script>") == 1
    assert "broken" in page
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import", page)
    assert len(page) < 50_000


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_settings_that_share_their_features_are_computed_as_alone_to_the_bit(precision: Precision):
    torch.manual_seed(0)
    small = replace(REFINE, backbone_channels=(8, 8, 8), feature_channels=16, num_layers=1)
    models = [GMFlow(replace(small, corr_radius=(-1, r), prop_radius=(-1, p))).eval() for r, p in ((2, 1), (3, 2))]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        prepare_model(model, ExecutionConfig(precision), keep_freed_memory=False)
    pairs = [255 * torch.rand(2, 1, 3, 50, 70) for _ in range(2)]
    with torch.inference_mode():
        alone = [[padded_flow(model, *pair) for model in models] for pair in pairs]
        shared = SharedFeatures(models)
        together = [[padded_flow(model, *pair) for model in shared.each()] for pair in pairs]
    for expected, found in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert not torch.equal(*found), "the radii differ, so must the flow"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_costs_model_runs_as_others_do_but_leaves_the_allocator_it_measures_alone(precision, monkeypatch):
    ran = []
    monkeypatch.setattr(cost, "padded_flow", lambda model, *images: ran.append(runs_in(model, None)))
    monkeypatch.setattr(
        execution, "keep_freed_memory_for_reuse", lambda: pytest.fail("the process keeps what is freed")
    )
    measured = CostConfig(height=32, width=32, cpus=torch.get_num_threads())
    meter = cost._Meter.__ray_metadata__.modified_class(measured, precision)
    meter.measure(replace(REFINE, backbone_channels=(4, 4, 4), feature_channels=4, num_layers=1))
    assert ran == [precision] * 2


def test_the_peak_is_what_was_held_at_once():
    def hold() -> None:
        first = torch.empty(2**20)  # 4 MiB
        second = torch.empty(2**20)
        del first, second
        torch.empty(2**19)

    assert _allocated_on_cpu(hold) == 8 * 2**20


def test_a_trial_is_another_with_other_weights_precision_or_validation(tree, load):
    """Else a sweep goes on with figures that were measured of something else."""
    plan = plan_of(load(tree))
    point = {"attn_splits_1": 1, "attn_splits_2": 4, "corr_radius": 3}
    limited = ["tune.stage.validation.0.limit=2", "probe.validation.0.limit=2"]
    plans = [
        plan,
        *(replace(plan, weights=Weights("w.safetensors", version, "w.pth")) for version in ("v1", "v2")),
        *(
            plan_of(load(tree, *overrides))
            for overrides in (["precision=bf16"], limited, ["tune.stage.validate_every=5"])
        ),
    ]
    assert len({one.trial(point).key for one in plans}) == len(plans)


def test_a_probes_figures_are_kept_by_all_that_decides_them():
    setting = Setting((2, 8), (-1, 4), (-1, 1))

    def key(version: str = "v", manifest_version: str = "m", precision: Any = "fp32", **chosen: Any) -> str:
        whole = SetConfig(**{"data": "chairs", "subset": "val"} | chosen)
        weights_of = Weights("w.safetensors", version, "w.pth")
        stored: Any = SimpleNamespace(url="c.json", version=manifest_version)
        (job,) = score_jobs(weights_of, [setting], whole, stored, precision)
        return job.key(setting)

    keys = [key(), key("w"), key(manifest_version="n"), key(precision="bf16"), key(subset="train"), key(limit=2)]
    keys += [key(only=("0*",)), key(without=("0*",)), key(only=("1*",))]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_cost_is_kept_by_how_and_where_it_was_measured_and_is_the_median(tmp_path):
    model, here = GMFlowConfig.refine(), {"device": "CPU", "torch": "2"}
    usual = CostConfig()
    others = [{"height": 64}, {"width": 64}, {"cpus": 2}, {"clock": "cpu"}]
    keys = [cost._key(model, CostConfig(**other), "fp32", here) for other in others]
    keys += [cost._key(model, usual, "bf16", here), cost._key(model, usual, "fp32", here | {"device": "GPU"})]
    keys += [cost._key(replace(model, attn_splits=(1, 4)), usual, "fp32", here)]
    first = cost._key(model, usual, "fp32", here)
    assert len({first, *keys}) == len(keys) + 1
    assert cost._key(model, CostConfig(rounds=9), "fp32", here) == first
    store = open_store(str(tmp_path))
    for seconds in (0.1, 9.0, 0.2):
        record = cost._Record.load(store, first)
        record.add(store, 3 * 2**20, seconds, model, here)
    assert record.cost() == cost.Cost(pytest.approx(200.0), 3.0)


def test_asha_stops_by_the_configs_rungs(tree, load):
    asha = tuning._scheduler(plan_of(load(tree, "tune.reduction_factor=2", "tune.grace_steps=7")))
    assert (asha._time_attr, asha._max_t, asha._reduction_factor) == ("step", 30, 2)
    assert [milestone for milestone, _ in asha._brackets[0]._rungs] == [28, 14, 7]
    usual = tuning._scheduler(plan_of(load(tree)))
    assert [milestone for milestone, _ in usual._brackets[0]._rungs] == [30, 10]


def asha_of(config: SweepConfig, *names: str) -> tuple[Any, dict[str, Any]]:
    """The sweep's scheduler, and trials that it knows."""
    asha = tuning._scheduler(plan_of(config))
    asha.set_search_properties(tuning.OBJECTIVE, "min")
    trials = {name: SimpleNamespace(trial_id=name) for name in names}
    for trial in trials.values():
        asha.on_trial_add(None, trial)
    return asha, trials


def test_asha_judges_no_trial_by_what_it_tells_again(tree, load):
    """Histories come in another order than at first: a late starter that won would be stopped at its first step."""
    plan = plan_of(load(tree))
    asha, trials = asha_of(plan.config, "late", *"abcdef")

    def tells(name: str, step: int, epe: float, *, told_again: bool) -> str:
        report = tuning._report(plan, step, {METRIC: epe}, told_again=told_again)
        return asha.on_trial_result(None, trials[name], report)

    assert [tells(name, 10, 1.0, told_again=True) for name in "abc"] == ["CONTINUE"] * 3
    assert tells("late", 10, 5.0, told_again=True) == "CONTINUE"
    assert tells("late", 30, 0.5, told_again=False) == "CONTINUE"
    assert tells("d", 10, 9.0, told_again=False) == "STOP", "the others' results count"
    assert tells("e", 10, 0.1, told_again=False) == "CONTINUE"


@pytest.mark.parametrize(
    ("ended", "trained", "told_again"),
    [
        (TrialResult("finished", "", 30), 30, {10: True, 20: True, 30: True}),
        (TrialResult("stopped", "behind", 20), 20, {10: True, 20: True}),
        (None, 25, {10: True, 20: True}),  # it went on behind step 20, so it was judged there
        (None, 20, {10: True, 20: False}),  # killed at step 20, perhaps before it was judged
        (None, 30, {10: True, 20: True, 30: False}),  # killed before its end was stored: tells the last step at the end
    ],
)
def test_a_trial_tells_again_what_it_was_judged_by(tree, load, monkeypatch, ended, trained, told_again):
    plan = plan_of(load(tree))
    trial = plan.trial(listed_points(plan.config, [])[0])
    records = TrialRecords.open(trial.folder)
    for step in told_again:
        records.add(step, {METRIC: 100.0 - step})
    if ended is not None:
        records.end(ended)
    reports: list[dict[str, Any]] = []
    newest = {"step": trained, "records": []}
    monkeypatch.setattr(tuning.CheckpointStore, "newest", lambda store, warn: newest)
    monkeypatch.setattr(tuning.tune, "report", reports.append)
    monkeypatch.setattr(tuning, "_train", lambda trial, plan: None)
    tuning.run_trial({"point": trial.point}, plan)
    told = {report["step"]: report["told_again"] for report in reports}
    if ended is None:
        assert told.pop(max(told_again)) is False  # once more at the end; here nothing was trained
        told_again.pop(max(told_again))
    assert told == told_again


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

    def register(client: Any, name: str, run_id: str, path: Path, lineage: registry.Lineage, rule: Any) -> Any:
        told.append((lineage.metrics[METRIC], lineage.stage, lineage.measured))
        return SimpleNamespace(name=name, version="1")

    monkeypatch.setattr(registry, "register", register)
    run: Any = SimpleNamespace(
        client=None,
        parent=SimpleNamespace(patience=lambda work, *a: work(*a)),
        child=lambda one: SimpleNamespace(run_id=one.name),
    )
    register_best(sweep, [*rows, replace(rows[0], status="stopped", metrics={METRIC: 0.1})], run, plan)
    assert [epe for epe, _, _ in told] == [2.0, 1.0]
    assert {stage for _, stage, _ in told} == {"small"}


def test_a_sweep_whose_windows_do_not_fit_its_pictures_says_so_before_anything_starts(manifests, tmp_path):
    sets = [{"data": "chairs", "subset": "val"}]
    config = {
        "name": "probe",
        "storage": str(tmp_path / "storage"),
        "data": {"chairs": manifests["chairs"]},
        "model": {"variant": "refine", "attn_splits": [1, 2], "corr_radius": [-1, 2]},
        "weights": "w.pth",
        "objective": sets[0],
        "cost": {"height": 48, "width": 64},
        "probe": {"grid": {"attn_splits": [[1], [2, 16]]}, "validation": sets},
    }
    with pytest.raises(PipelineError, match=r"attn_splits 16 at scale 2 cuts images of 48×64"):
        prepare(SweepConfig.model_validate(config))
