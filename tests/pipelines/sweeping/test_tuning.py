"""Trials on Ray Tune, without Ray: what is told to it, when, and what it decides."""

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.tune.search import Searcher

import pipelines.sweep
from datasets_etl.errors import DamagedError, DataError
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from pipelines.errors import PipelineError
from pipelines.sweep import plan_trials, seeds_of
from pipelines.sweeping import search, trial_driver, tuning
from pipelines.sweeping.accuracy import Weights
from pipelines.sweeping.board import TrialBoard
from pipelines.sweeping.config import SweepConfig
from pipelines.sweeping.search import DistinctOptuna
from pipelines.sweeping.settings import Setting
from pipelines.sweeping.table import Row
from pipelines.sweeping.tracking import SweepRun
from pipelines.sweeping.trials import (
    Trial,
    TrialPlan,
    TrialRecords,
    TrialResult,
    announce,
    announced,
    listed_points,
)
from tests.pipelines.sweeping.made import MANIFESTS, METRIC, REFINE, plan_of


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

    monkeypatch.setattr(trial_driver, "_train", die)
    plan = plan_of(load(tree))
    point = listed_points(plan.config, [])[0]
    with pytest.raises(type(died_of)):
        trial_driver.run_trial({"point": point}, plan)
    assert TrialRecords.open(plan.trial(point).folder).result == kept


def test_a_trials_driver_waits_for_storage_as_its_workers_do(tree, load, monkeypatch):
    waits = []

    def look(trial: Trial, plan: TrialPlan) -> None:
        waits.append(os.environ[PATIENCE_VARIABLE])
        raise ActorDiedError

    monkeypatch.setattr(trial_driver, "_train", look)
    plan = plan_of(load(tree, "tune.machine={storage_patience_s: 33}"))
    with pytest.raises(ActorDiedError):
        trial_driver.run_trial({"point": listed_points(plan.config, [])[0]}, plan)
    assert waits == ["33.0"]


def test_a_validation_that_storage_missed_is_made_up_for_in_its_place(tree, load):
    plan = plan_of(load(tree))
    trial = plan.trial(listed_points(plan.config, [])[0])
    told = {10: 3.0, 20: 2.0, 30: 1.0}
    TrialRecords.open(trial.folder).add(20, {METRIC: told[20]})
    records = [(step, {METRIC: epe, "train/loss": 1.0}) for step, epe in told.items()]
    trial_driver._catch_up(trial, plan, {"records": [*records, (15, {"train/loss": 9.0})]})
    assert TrialRecords.open(trial.folder).history == [(step, {METRIC: epe}) for step, epe in told.items()]


def test_a_trial_that_was_stopped_stays_so_whatever_its_driver_still_meets(tree, load, monkeypatch):
    """Tune decides, and only then ends the processes, of which the driver is not the first."""
    plan = plan_of(load(tree))
    point = listed_points(plan.config, [])[0]
    stopped = TrialResult("stopped", "behind the others at step 20", 20)

    def stop(trial: Trial, plan: TrialPlan) -> None:
        TrialRecords.open(trial.folder).end(stopped)
        raise PipelineError("ended without a new checkpoint")

    monkeypatch.setattr(trial_driver, "_train", stop)
    with pytest.raises(PipelineError):
        trial_driver.run_trial({"point": point}, plan)
    assert TrialRecords.open(plan.trial(point).folder).result == stopped


def test_asha_stops_by_the_configs_rungs(tree, load):
    asha: Any = search.scheduler_of(plan_of(load(tree, "tune.reduction_factor=2", "tune.grace_steps=7")))
    assert (asha._time_attr, asha._max_t, asha._reduction_factor) == ("step", 30, 2)
    assert [milestone for milestone, _ in asha._brackets[0]._rungs] == [28, 14, 7]
    usual: Any = search.scheduler_of(plan_of(load(tree)))
    assert [milestone for milestone, _ in usual._brackets[0]._rungs] == [30, 10]


def asha_of(config: SweepConfig, *names: str) -> tuple[Any, dict[str, Any]]:
    """The sweep's scheduler, and trials that it knows."""
    asha: Any = search.scheduler_of(plan_of(config))
    asha.set_search_properties(search.OBJECTIVE, "min")
    trials = {name: SimpleNamespace(trial_id=name) for name in names}
    for trial in trials.values():
        asha.on_trial_add(None, trial)
    return asha, trials


def test_asha_judges_no_trial_by_what_it_tells_again(tree, load):
    """Histories come in another order than at first: a late starter that won would be stopped at its first step."""
    plan = plan_of(load(tree))
    asha, trials = asha_of(plan.config, "late", *"abcdef")

    def tells(name: str, step: int, epe: float, *, replayed: bool) -> str:
        report = trial_driver._report(plan, step, {METRIC: epe}, replayed=replayed)
        return asha.on_trial_result(None, trials[name], report)

    assert [tells(name, 10, 1.0, replayed=True) for name in "abc"] == ["CONTINUE"] * 3
    assert tells("late", 10, 5.0, replayed=True) == "CONTINUE"
    assert tells("late", 30, 0.5, replayed=False) == "CONTINUE"
    assert tells("d", 10, 9.0, replayed=False) == "STOP", "the others' results count"
    assert tells("e", 10, 0.1, replayed=False) == "CONTINUE"


@pytest.mark.parametrize(
    ("ended", "trained", "replayed"),
    [
        (TrialResult("finished", "", 30), 30, {10: True, 20: True, 30: True}),
        (TrialResult("stopped", "behind", 20), 20, {10: True, 20: True}),
        (None, 25, {10: True, 20: True}),  # it went on behind step 20, so it was judged there
        (None, 20, {10: True, 20: False}),  # killed at step 20, perhaps before it was judged
        (None, 30, {10: True, 20: True, 30: False}),  # killed before its end was stored: tells the last step at the end
    ],
)
def test_a_trial_tells_again_what_it_was_judged_by(tree, load, monkeypatch, ended, trained, replayed):
    plan = plan_of(load(tree))
    trial = plan.trial(listed_points(plan.config, [])[0])
    records = TrialRecords.open(trial.folder)
    for step in replayed:
        records.add(step, {METRIC: 100.0 - step})
    if ended is not None:
        records.end(ended)
    reports: list[dict[str, Any]] = []
    newest = {"step": trained, "records": []}
    monkeypatch.setattr(trial_driver.CheckpointStore, "newest", lambda store, warn: newest)
    monkeypatch.setattr(trial_driver.tune, "report", reports.append)
    monkeypatch.setattr(trial_driver, "_train", lambda trial, plan: None)
    trial_driver.run_trial({"point": trial.point}, plan)
    told = {report["step"]: report["replayed"] for report in reports}
    if ended is None:
        assert told.pop(max(replayed)) is False  # once more at the end; here nothing was trained
        replayed.pop(max(replayed))
    assert told == replayed


def test_optuna_tries_all_of_a_space_that_it_may_try_whole(tree, load):
    """Also what it likes least: else its search would end at a quarter of these."""
    space = ["tune.space.attn_splits=[[1,2,4],[1,2,4,8]]", "tune.space.peak_lr=[1e-5,2e-5,4e-5,1e-4]"]
    plan = plan_of(load(tree, "tune.searcher=optuna", "tune.trials=60", "tune.space.corr_radius=[3]", *space))
    searcher, points = DistinctOptuna(plan, [], 0), []
    while isinstance(found := searcher.suggest(str(len(points))), dict):
        point = found["point"]
        value = abs(point["attn_splits_1"] - 2) * 10 + abs(point["attn_splits_2"] - 8) + point["peak_lr"] * 1e4
        searcher.on_trial_complete(str(len(points)), {"objective": value, "training_iteration": 1})
        points.append(point)
    assert len(points) == len({tuple(sorted(point.items())) for point in points}) == 48
    assert found == Searcher.FINISHED


@pytest.mark.parametrize("searcher", ["grid", "random", "optuna"])
def test_only_a_search_whose_every_trial_ended_is_replayed(tree, load, searcher):
    plan = plan_of(load(tree, f"tune.searcher={searcher}", "tune.trials=3"))
    for number, point in enumerate(listed_points(load(tree), [])[:4]):
        announce(plan.trial(point), number)
        known = announced(plan)
        if number == 2:
            assert tuning._all_ended(plan, [], known) == []
        TrialRecords.open(plan.trial(point).folder).end(TrialResult("finished", "", 30))
        assert len(tuning._all_ended(plan, [], known)) == (3 if number >= 2 else 0)


def test_a_search_that_may_try_more_than_there_is_ends_with_the_last_point(tree, load):
    plan = plan_of(load(tree, "tune.searcher=optuna", "tune.trials=20"))
    for number, point in enumerate(listed_points(load(tree), [])):
        announce(plan.trial(point), number)
        TrialRecords.open(plan.trial(point).folder).end(TrialResult("finished", "", 30))
    assert len(tuning._all_ended(plan, [], announced(plan))) == 8


def test_a_validation_behind_the_newest_checkpoint_may_not_have_been_judged(tree, load, monkeypatch):
    plan = plan_of(load(tree, "tune.stage.validate_every=5"))
    trial = plan.trial(listed_points(plan.config, [])[0])
    for step in (5, 10, 15):
        TrialRecords.open(trial.folder).add(step, {METRIC: 1.0})
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(trial_driver.CheckpointStore, "newest", lambda store, warn: {"step": 5, "records": []})
    monkeypatch.setattr(trial_driver.tune, "report", reports.append)
    monkeypatch.setattr(trial_driver, "_train", lambda trial, plan: None)
    trial_driver.run_trial({"point": trial.point}, plan)
    assert [(told["step"], told["replayed"]) for told in reports][:3] == [(5, True), (10, True), (15, False)]


def test_validations_are_told_once_and_the_last_one_only_when_the_end_is_stored(tree, load, monkeypatch):
    plan = plan_of(load(tree))
    trial = plan.trial(listed_points(plan.config, [])[0])
    told: list[int] = []
    monkeypatch.setattr(trial_driver.TuneReportCallback, "__init__", lambda self: None)
    monkeypatch.setattr(
        trial_driver.TuneReportCallback,
        "after_report",
        lambda self, run, metrics, checkpoint: told.append(metrics[0]["step"]),
    )
    passing = trial_driver._ReportValidations(trial, plan)
    for step in (10, 15, 20, 20, 30):
        passing.after_report(None, [{"step": step, METRIC: 1.0}], None)
    assert told == [10, 20]
    assert [step for step, _ in TrialRecords.open(trial.folder).history] == [10, 20, 30]


def test_a_trial_that_tune_ends_before_its_last_step_was_stopped(tree, load):
    plan = plan_of(load(tree))
    ends: list[TrialResult] = []
    points = listed_points(plan.config, [])[:2]
    listener: Any = SimpleNamespace(started=lambda trial: None, ended=lambda trial, result: ends.append(result))
    book = tuning._Bookkeeping(plan, listener, 0)
    for point in points:
        book.on_trial_start(0, [], SimpleNamespace(config={"point": point}))
    assert [trial.point for trial in announced(plan)] == points
    assert [json.loads(open_store(plan.trial(p).folder).read("trial.json"))["number"] for p in points] == [0, 1]
    book.on_trial_complete(0, [], SimpleNamespace(config={"point": points[0]}, last_result={"step": 20}))
    assert ends == [TrialRecords.open(plan.trial(points[0]).folder).result]
    assert (ends[0].status, ends[0].step) == ("stopped", 20)


def test_a_trial_whose_driver_is_lost_while_it_starts_is_one_that_failed(tracked):
    """Ray Tune tells of its end without having told of its start."""
    sweep = tracked()
    plan = plan_trials(sweep, Weights("w", "v", "w.pth"))
    board = TrialBoard(sweep.view, SweepRun(sweep.config, plan.weights, MANIFESTS, print))
    book = tuning._Bookkeeping(plan, board, 0)
    book.on_trial_error(0, [], SimpleNamespace(config={"point": listed_points(plan.config, [])[0]}))
    assert [row.status for row in board.rows.values()] == ["failed"]


def test_the_board_takes_validations_from_tune_alone_and_nothing_after_a_stop(tree, load):
    plan = plan_of(load(tree))
    trial = plan.trial(listed_points(plan.config, [])[0])
    logged: list[Any] = []
    run: Any = SimpleNamespace(
        describe=lambda *_: None, end=lambda row: None, log=lambda row, record: logged.append(record)
    )
    board = TrialBoard(SimpleNamespace(show=lambda row: None, log=lambda line: None), run)
    board.started(trial)
    record = trial_driver.TrialRecord(5, {"train/loss": 1.0, METRIC: 9.0}, trial=trial.name)
    board.show(trial_driver.TrialRecord(25, {}, trial=trial.name))
    board.keep(record)
    assert [one.metrics for one in logged] == [{"train/loss": 1.0}]
    board.ended(trial, TrialResult("stopped", "behind", 20))
    board.keep(record)
    board.show(trial_driver.TrialRecord(28, {}, trial=trial.name))
    assert len(logged) == 1
    assert board.rows[trial.name].step == 25


def test_seeds_are_those_that_trials_may_have(tree, load):
    """The probe's grid may hold more than the space of the trials, and be best there."""
    config = load(tree, "tune.seeds=1")
    inside, outside = Setting((2, 8), (-1, 3), (-1, 1)), Setting((2, 8), (-1, 6), (-1, 1))
    rows = [
        Row(one.name, "probe", one.name, one.on(REFINE), "finished", metrics={METRIC: epe}, front=True)
        for epe, one in ((1.0, outside), (2.0, inside))
    ]
    assert seeds_of(config, rows) == [inside]


@pytest.mark.parametrize("probed", [[], [Row("p", "probe", "k", REFINE, "finished")]])
def test_a_sweep_without_a_finished_trial_ends_with_a_line(tracked, monkeypatch, probed):
    rows = [*probed]
    rows += [Row("a", "trial", "k1", REFINE, "failed", reason="of this"), Row("b", "trial", "k2", REFINE, "stopped")]
    sweep = tracked()
    for name, result in (("pinned_weights", None), ("_say_overlap", None), ("tune", rows), ("report", None)):
        monkeypatch.setattr(pipelines.sweep, name, lambda *_, result=result, **__: result)
    monkeypatch.setattr(pipelines.sweep, "with_costs", lambda sweep, rows: rows)
    monkeypatch.setattr(SweepRun, "judge", lambda *_: None)
    with pytest.raises(PipelineError, match="no trial finished, and 1 failed; a because: of this"):
        pipelines.sweep._run_phases(sweep, lambda: True, retry=False)
