"""A trial's driver, which Ray Tune starts: trains the trial as a stage of a curriculum, and reports its validations.

A trial that is on storage first replays its history, so that Tune's scheduler and searcher know it. Then it resumes
from its stage's checkpoint, or ends as it ended before.
"""

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.tune.integration.ray_train import TuneReportCallback

from datasets_etl.storage import open_store
from datasets_etl.storage_retries import waiting_for_storage
from pipelines.errors import LASTING_ERRORS, USER_ERRORS, PipelineError
from pipelines.sweeping.search import OBJECTIVE, REPLAYED, STEP
from pipelines.sweeping.trials import Trial, TrialPlan, TrialRecords, TrialResult
from pipelines.training.beginning import provide_initial_weights
from pipelines.training.checkpoints import CheckpointStore
from pipelines.training.feed import FeedWriter, Record, listening
from pipelines.training.launch import final_weights, fit_stage
from pipelines.training.plan import FINAL_WEIGHTS
from pipelines.training.stage import StageJob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialRecord(Record):
    """A worker's record with the name of its trial: several trials share the sweep's queue."""

    trial: str = ""


def run_trial(config: dict[str, Any], plan: TrialPlan) -> None:
    """Replay what storage holds of a trial, train it to its end, store the final weights, then report the end.

    Args:
        config: Tune's: the trial's point of the space.
        plan: what all trials share.
    """
    with waiting_for_storage(plan.tune.machine.storage_patience_s):
        trial = plan.trial(config["point"])
        records = TrialRecords.open(trial.folder)
        ended = records.result
        if ended is None:
            _replay_unfinished(trial, plan)
            _train_to_the_end(trial, plan)
            return
        for step, metrics in records.history:
            tune.report(_report(plan, step, metrics, replayed=True))
        if ended.status == "failed":
            raise PipelineError(ended.reason)  # Tune needs this: the trial may never have reported a metric


def _replay_unfinished(trial: Trial, plan: TrialPlan) -> None:
    """Report the history again, but for the last step: it is reported once the weights are stored."""
    reached = 0
    if (snapshot := CheckpointStore(open_store(trial.folder)).newest(log.warning)) is not None:
        _catch_up(trial, plan, snapshot)
        reached = snapshot["step"]
    records = TrialRecords.open(trial.folder)
    for step, metrics in records.history:
        if step < trial.stage.steps:
            # An attempt that was killed at a validation may have ended before Tune judged the trial by it.
            judged = step < max(reached, records.last_step)
            tune.report(_report(plan, step, metrics, replayed=judged))


def _train_to_the_end(trial: Trial, plan: TrialPlan) -> None:
    """Train, then store that the trial is finished, or that it failed by its own fault."""
    records = TrialRecords.open(trial.folder)
    try:
        _train(trial, plan)
    except RayActorError:
        raise  # its controller is gone, stopped by Tune or with its machine: that is not the trial's fault
    except Exception as error:
        if isinstance(error, USER_ERRORS) and not isinstance(error, LASTING_ERRORS):
            raise  # storage was unreachable for too long: not its fault either
        reason = error if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: {error}"
        records.end(TrialResult("failed", " ".join(str(reason).split())[:500], records.last_step))
        raise
    # Report the last step only after the weights are stored: Tune may stop a trial that has reported it.
    step, metrics = TrialRecords.open(trial.folder).history[-1]
    records.end(TrialResult("finished", "", step))
    tune.report(_report(plan, step, metrics))


def _report(plan: TrialPlan, step: int, metrics: dict[str, float], *, replayed: bool = False) -> dict[str, Any]:
    return {STEP: step, OBJECTIVE: metrics[plan.config.metric], "metrics": metrics, REPLAYED: replayed}


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


def _remember(trial: Trial, plan: TrialPlan, step: int, metrics: dict[str, Any]) -> dict[str, float] | None:
    """Add the metrics of a step to the trial's history if they are those of a due validation.

    Returns the validation's scores; None if nothing was added, also because the history has them already.
    """
    stage = trial.stage
    due = step == stage.steps or (stage.validate_every is not None and step % stage.validate_every == 0)
    records = TrialRecords.open(trial.folder)
    if not due or step in dict(records.history) or plan.config.metric not in metrics:
        return None
    scores = {name: float(value) for name, value in metrics.items() if name.startswith("val/")}
    records.add(step, scores)
    return scores


class _ReportValidations(TuneReportCallback):
    """Passes a stage's validations to storage and to Tune; the last one only to storage, see `_train_to_the_end`.

    It runs in Ray Train's controller.
    """

    def __init__(self, trial: Trial, plan: TrialPlan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trial = trial
        self.plan = plan

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        step = int(metrics[0][STEP])
        with waiting_for_storage(self.plan.tune.machine.storage_patience_s):
            scores = _remember(self.trial, self.plan, step, metrics[0])
        if scores is not None and step < self.trial.stage.steps:
            super().after_report(run_context, [_report(self.plan, step, scores)], None)
