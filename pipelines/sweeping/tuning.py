"""Tuning on Ray Tune: starts the trials' drivers, and passes what happens to them on to the sweep's driver.

A sweep is resumed without Tune's restore: each trial's driver replays its own history. So a killed sweep does not
depend on Tune's pickled state, and may be continued with more trials than at its start.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray import tune

from pipelines.cluster import nodes, own_node
from pipelines.sweeping.room import concurrent_trials, drivers_at_once
from pipelines.sweeping.search import OBJECTIVE, STEP, scheduler_of, search_of
from pipelines.sweeping.settings import Setting
from pipelines.sweeping.trial_driver import run_trial
from pipelines.sweeping.trials import (
    Trial,
    TrialPlan,
    TrialRecords,
    TrialResult,
    all_points,
    announce,
    announced,
    listed_points,
)
from pipelines.training.feed import Record, listening


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
        _replay(ended, listener)
        return
    space, searcher, samples = search_of(plan, seeds, [trial.point for trial in known])
    driver = tune.with_resources(tune.with_parameters(run_trial, plan=plan), driver_resources())
    tuner = tune.Tuner(
        driver,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="min",
            search_alg=searcher,
            scheduler=scheduler_of(plan),
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
        logging.getLogger(name).addFilter(_without_trial_traces)
    with listening(plan.feed, listener.show, listener.keep):
        tuner.fit()


def driver_resources() -> tune.PlacementGroupFactory:
    """What a trial's driver asks for: the node of the sweep's own driver, so that losing another node does not end it.

    The driver only waits: if drivers took CPUs, they would starve the workers they wait for. A request may not be
    empty, so it asks for one byte of memory.
    """
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    return tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[here])


def _without_trial_traces(record: logging.LogRecord) -> bool:
    """A log filter: drops Tune's stack traces of failed trials, whose failure is already reported, and stored."""
    return not record.getMessage().startswith(("Trial task failed", "Trials did not complete"))


def _all_ended(
    plan: TrialPlan, seeds: Sequence[Setting], known: Sequence[Trial]
) -> list[tuple[Trial, TrialRecords, TrialResult]]:
    """All trials of the search, if each of them has ended; else an empty list, because Tune has work to do.

    `known` are the announced trials. Some may be outside the search: it may be smaller now.
    """
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


def _replay(ended: Sequence[tuple[Trial, TrialRecords, TrialResult]], listener: Listener) -> None:
    """Call the listener as Tune's loop would if the ended trials were started once more."""
    for trial, records, result in ended:
        listener.started(trial)
        for step, metrics in records.history:
            listener.validated(trial, step, metrics)
        listener.ended(trial, result)


class _Bookkeeping(tune.Callback):
    """Passes the events of Tune's loop to the sweep's driver, the only one that prints and writes to MLflow.

    Args:
        plan: what all trials share.
        listener: the driver's.
        number: how many trials were announced before; the next one gets this number.
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
        self.listener.validated(self._trial(trial), int(result[STEP]), result["metrics"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = self._trial(trial)
        records = TrialRecords.open(ended.folder)
        step = int(trial.last_result[STEP])
        # `end` keeps an end that the trial has already stored.
        result = records.end(TrialResult("stopped", f"behind the others at step {step}", step))
        self.listener.ended(ended, result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = self._trial(trial)
        # If no stored result says that the trial itself failed, the same command retries it.
        silent = TrialResult("failed", "its driver or storage was lost; the same command tries it again")
        self.listener.ended(ended, TrialRecords.open(ended.folder).result or silent)
