"""Tuning on Ray Tune: each trial's driver trains a stage as the curriculum does, and reports validations to Tune.

This module resumes a sweep itself, without Tune's restore: a trial that is on storage reports its history again, so
that scheduler and searcher know it, and then resumes from its stage's checkpoint, or ends as it ended before. So a
killed sweep does not depend on Tune's pickled state, and may be continued with more trials than at its start.
"""

import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# Tune reads these on import. The sweep handles Ctrl-C and the terminal; nobody reads Tune's CSV and TensorBoard files.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

import numpy as np
import ray
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from datasets_etl.storage import open_store
from datasets_etl.storage_retries import waiting_for_storage
from pipelines.cluster import nodes, own_node
from pipelines.errors import LASTING_ERRORS, USER_ERRORS, PipelineError
from pipelines.sweeping.config import RangeConfig
from pipelines.sweeping.room import concurrent_trials, drivers_at_once
from pipelines.sweeping.settings import Setting
from pipelines.sweeping.trials import (
    Point,
    Trial,
    TrialPlan,
    TrialRecords,
    TrialResult,
    all_points,
    announce,
    announced,
    dimensions,
    listed_points,
    seed_points,
)
from pipelines.training.checkpoints import CheckpointStore
from pipelines.training.feed import FeedWriter, Record, listening
from pipelines.training.launch import final_weights, fit_stage, provide_initial_weights
from pipelines.training.plan import FINAL_WEIGHTS
from pipelines.training.stage import StageJob

log = logging.getLogger(__name__)

OBJECTIVE = "objective"
"""The metric by which Tune compares trials: the config's objective, lower is better."""

_STEP = "step"
_TOLD_AGAIN = "told_again"
_REDRAWS = 100


@dataclass(frozen=True)
class TrialRecord(Record):
    """A worker's record with the name of its trial: several trials share the sweep's queue."""

    trial: str = ""


class Listener(Protocol):
    """The sweep's driver: called with news of trials by Tune's loop, and of their workers by the feed."""

    def started(self, trial: Trial) -> None:
        """A trial begins, or goes on."""
        ...

    def validated(self, trial: Trial, step: int, metrics: dict[str, float]) -> None:
        """A trial was validated, now or in an earlier attempt."""
        ...

    def ended(self, trial: Trial, result: TrialResult) -> None:
        """A trial has ended, perhaps without having started: its driver may be lost before."""
        ...

    def show(self, record: Record) -> None:
        """Called with each `TrialRecord`, at once."""
        ...

    def keep(self, record: Record) -> None:
        """Called with each `TrialRecord`, in a separate thread."""
        ...


def tune_trials(plan: TrialPlan, seeds: Sequence[Setting], listener: Listener) -> None:
    """Train the trials to their ends; one that fails does not end the others. Needs a connected Ray with its dashboard.

    Args:
        plan: what all trials share.
        seeds: settings to try first.
        listener: called with news of the trials.
    """
    known = announced(plan)
    if ended := _all_ended(plan, seeds, known):
        _tell_again(ended, listener)
        return
    space, searcher, samples = _search(plan, seeds, [trial.point for trial in known])
    driver = tune.with_resources(tune.with_parameters(run_trial, plan=plan), driver_resources())
    tuner = tune.Tuner(
        driver,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="min",
            search_alg=searcher,
            scheduler=_scheduler(plan),
            num_samples=samples,
            max_concurrent_trials=min(concurrent_trials(plan.config, nodes()), drivers_at_once(own_node())),
            trial_name_creator=lambda trial: plan.trial(trial.config["point"]).name,
            trial_dirname_creator=lambda trial: plan.trial(trial.config["point"]).name,
            reuse_actors=False,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=plan.folder.rpartition("/")[0],
            verbose=0,
            callbacks=[_Bookkeeping(plan, listener, len(known))],
        ),
    )
    for name in ("ray.tune.execution.tune_controller", "ray.tune.tune"):
        logging.getLogger(name).addFilter(_is_no_trials_failure)
    with listening(plan.feed, listener.show, listener.keep):
        tuner.fit()


def driver_resources() -> tune.PlacementGroupFactory:
    """What a trial's driver asks for: the node of the sweep's own driver, so that losing another node does not end it.

    The driver only waits: if drivers took CPUs, they would starve the workers they wait for. A request may not be
    empty, so it asks for one byte of memory.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[here])


def _is_no_trials_failure(record: logging.LogRecord) -> bool:
    """False for Tune's own traces of a failed trial: its failure is already reported in a line, and stored."""
    return not record.getMessage().startswith(("Trial task failed", "Trials did not complete"))


def _all_ended(
    plan: TrialPlan, seeds: Sequence[Setting], known: Sequence[Trial]
) -> list[tuple[Trial, TrialRecords, TrialResult]]:
    """Those of the `known` trials that the search is of, if all of them have ended; otherwise an empty list."""
    if plan.tune.searcher == "optuna":
        wanted = min(plan.tune.trials or 1, len(all_points(plan.tune)) or math.inf)
        trials = known[: plan.tune.trials]
    else:
        points = listed_points(plan.config, seeds, [trial.point for trial in known])
        keys = {plan.trial(point).key for point in points}
        wanted = len(keys)
        trials = [trial for trial in known if trial.key in keys]
    ended = []
    for trial in trials:
        records = TrialRecords.open(trial.folder)
        if (result := records.result) is not None:
            ended.append((trial, records, result))
    return ended if len(ended) == wanted else []


def _tell_again(ended: Sequence[tuple[Trial, TrialRecords, TrialResult]], listener: Listener) -> None:
    """Tell the listener of ended trials what Tune's loop would tell if they were replayed."""
    for trial, records, result in ended:
        listener.started(trial)
        for step, metrics in records.history:
            listener.validated(trial, step, metrics)
        listener.ended(trial, result)


def _scheduler(plan: TrialPlan) -> TrialScheduler:
    if plan.tune.scheduler == "none":
        return FIFOScheduler()
    return RememberingASHA(
        time_attr=_STEP,
        max_t=plan.tune.stage.steps,
        grace_period=plan.tune.grace,
        reduction_factor=plan.tune.reduction_factor,
        stop_last_trials=False,
    )


class RememberingASHA(ASHAScheduler):
    """ASHA that judges no trial by what it tells again: it was judged by that before, beside other trials' results.

    They come in another order now, so that a trial that went on then could be stopped at an early step now.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result[_TOLD_AGAIN] else decision


def _search(
    plan: TrialPlan, seeds: Sequence[Setting], known: Sequence[Point]
) -> tuple[dict[str, Any] | None, Searcher | None, int]:
    """(param space, searcher, samples) for Tune; points that are `known` from earlier attempts come first."""
    if plan.tune.searcher != "optuna":
        return {"point": tune.grid_search(listed_points(plan.config, seeds, known))}, None, 1
    first = [*known, *(point for point in seed_points(plan.config, seeds) if point not in known)]
    return None, DistinctOptuna(plan, first, len(known)), plan.tune.trials or 1


class DistinctOptuna(OptunaSearch):
    """Optuna's TPE over the space, without repeats: a repeated point would be the same stage in the same folder.

    Args:
        plan: has the space.
        first: points to begin with.
        drawn: number of points of earlier attempts. It is added to the sampler's seed; otherwise the sampler would draw
            those points again.
    """

    def __init__(self, plan: TrialPlan, first: Sequence[Point], drawn: int) -> None:
        import optuna  # imported only if it is used

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space: dict[str, Any] = {}
        for name, values in dimensions(plan.tune).items():
            space[f"point/{name}"] = (
                optuna.distributions.FloatDistribution(values.low, values.high, log=True)
                if isinstance(values, RangeConfig)
                else optuna.distributions.CategoricalDistribution(values)
            )
        self._failed_state = optuna.trial.TrialState.FAIL
        self._seen: list[Point] = []
        self._all = all_points(plan.tune)
        self._generator = np.random.default_rng(plan.config.seed + drawn)
        super().__init__(
            space,
            metric=OBJECTIVE,
            mode="min",
            points_to_evaluate=[{f"point/{name}": value for name, value in point.items()} for point in first],
            seed=(plan.config.seed + drawn) % 2**32,  # Optuna takes no larger one
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        for _ in range(_REDRAWS):
            found: dict[str, Any] | None = super().suggest(trial_id)
            if found is None or found["point"] not in self._seen:
                if found is not None:
                    self._seen.append(found["point"])
                return found
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=self._failed_state)
            if left := [point for point in self._all if point not in self._seen]:
                # TPE would draw what it likes best again and again, and the search would end with most points untried.
                point = left[int(self._generator.integers(len(left)))]
                self._ot_study.enqueue_trial({f"point/{name}": value for name, value in point.items()})
        return str(Searcher.FINISHED)


def run_trial(config: dict[str, Any], plan: TrialPlan) -> None:
    """A trial's driver: replay what storage holds, continue training, store the final weights, then report the end."""
    with waiting_for_storage(plan.tune.machine.storage_patience_s):
        _replay_and_train(plan.trial(config["point"]), plan)


def _replay_and_train(trial: Trial, plan: TrialPlan) -> None:
    records = TrialRecords.open(trial.folder)
    ended = records.result
    trained = 0
    if ended is None and (snapshot := CheckpointStore(open_store(trial.folder)).newest(log.warning)) is not None:
        _catch_up(trial, plan, snapshot)
        records, trained = TrialRecords.open(trial.folder), snapshot["step"]
    for step, metrics in records.history:
        if ended is not None or step < trial.stage.steps:
            # Where it was killed at a validation, it may not have been judged by that one.
            judged = ended is not None or step < max(trained, records.last_step)
            tune.report(_report(plan, step, metrics, told_again=judged))
    if ended is not None and ended.status == "failed":
        raise PipelineError(ended.reason)  # Tune needs this: the trial may never have reported a metric
    if ended is None:
        try:
            _train(trial, plan)
        except RayActorError:
            raise  # its controller is gone, stopped by Tune or with its machine: that is not the trial's fault
        except Exception as error:
            if isinstance(error, USER_ERRORS) and not isinstance(error, LASTING_ERRORS):
                raise  # storage was unreachable for too long: not its fault either
            told = error if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"
            records.end(TrialResult("failed", " ".join(str(told).split())[:500], records.last_step))
            raise
        # Report the last step only after the weights are stored: Tune may stop a trial that has reported it.
        step, metrics = TrialRecords.open(trial.folder).history[-1]
        records.end(TrialResult("finished", "", step))
        tune.report(_report(plan, step, metrics))


def _report(plan: TrialPlan, step: int, metrics: dict[str, float], *, told_again: bool = False) -> dict[str, Any]:
    return {_STEP: step, OBJECTIVE: metrics[plan.config.metric], "metrics": metrics, _TOLD_AGAIN: told_again}


def _train(trial: Trial, plan: TrialPlan) -> None:
    store = open_store(trial.folder)
    config = plan.config
    start = None if plan.weights is None else plan.weights.url
    provide_initial_weights(store, trial.model, config.seed, start, None)
    name = trial.folder.rpartition("/")[2]
    job = StageJob(
        stage=trial.stage,
        machine=plan.tune.machine,
        data={used.data: plan.data[used.data] for used in trial.stage.reads},
        folder=store.url,
        feed=f"feed-{name}",
        seed=config.seed,
        precision=config.precision,
    )
    writer = FeedWriter(plan.feed)

    def forward(record: Record) -> None:
        writer.send(TrialRecord(**vars(record), trial=trial.name))

    with listening(job.feed, forward, lambda record: None):
        last = fit_stage(job, name, [_ReportValidations(trial, plan)])
    _catch_up(trial, plan, last)
    with tempfile.TemporaryDirectory(prefix="gmflow-final-") as folder:
        weights = Path(folder) / FINAL_WEIGHTS
        final_weights(last, trial.model, weights)
        store.upload(weights, FINAL_WEIGHTS)
    if TrialRecords.open(trial.folder).last_step != trial.stage.steps:
        raise PipelineError(
            f"{config.metric} has no value at the last step: no pixel counts for it, or the flow is not finite; "
            "compare by another objective, or lower peak_lr"
        )


def _catch_up(trial: Trial, plan: TrialPlan, snapshot: dict[str, Any]) -> None:
    """Add the validations of a checkpoint that the history lacks: the attempt was killed between the two writes."""
    for step, metrics in snapshot["records"]:
        _remember(trial, plan, step, metrics)


def _remember(trial: Trial, plan: TrialPlan, step: int, told: dict[str, Any]) -> dict[str, float] | None:
    """Add a due validation to the trial's history. Returns its scores; None if it is not one, or is there already."""
    stage = trial.stage
    due = step == stage.steps or (stage.validate_every is not None and step % stage.validate_every == 0)
    records = TrialRecords.open(trial.folder)
    if not due or step in dict(records.history) or plan.config.metric not in told:
        return None
    scores = {name: float(value) for name, value in told.items() if name.startswith("val/")}
    records.add(step, scores)
    return scores


class _ReportValidations(TuneReportCallback):
    """Passes a stage's validations to storage and to Tune; the last one only to storage, see `run_trial`.

    It runs in Ray Train's controller.
    """

    def __init__(self, trial: Trial, plan: TrialPlan) -> None:
        super().__init__()
        self.trial = trial
        self.plan = plan

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        step = int(metrics[0][_STEP])
        with waiting_for_storage(self.plan.tune.machine.storage_patience_s):
            scores = _remember(self.trial, self.plan, step, metrics[0])
        if scores is not None and step < self.trial.stage.steps:
            super().after_report(run_context, [_report(self.plan, step, scores)], None)


class _Bookkeeping(tune.Callback):
    """Passes the events of Tune's loop to the sweep's driver, the only one that prints and writes to MLflow.

    Args:
        plan: what all trials share.
        listener: the driver's.
        number: of the next trial that starts: how many were announced before.
    """

    def __init__(self, plan: TrialPlan, listener: Listener, number: int) -> None:
        self.plan = plan
        self.listener = listener
        self.number = number

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the listener, which has open connections: Tune pickles its run for `Tuner.restore`, unused here."""
        return {"plan": self.plan}

    def _trial(self, trial: Any) -> Trial:
        return self.plan.trial(trial.config["point"])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        started = self._trial(trial)
        announce(started, self.number)
        self.number += 1
        self.listener.started(started)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.listener.validated(self._trial(trial), int(result[_STEP]), result["metrics"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = self._trial(trial)
        records = TrialRecords.open(ended.folder)
        step = int(trial.last_result[_STEP])
        # `end` keeps an end that the trial has already stored.
        result = records.end(TrialResult("stopped", f"behind the others at step {step}", step))
        self.listener.ended(ended, result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = self._trial(trial)
        # If no stored result says that the trial itself failed, the same command retries it.
        silent = TrialResult("failed", "its driver or storage was lost; the same command tries it again")
        self.listener.ended(ended, TrialRecords.open(ended.folder).result or silent)
