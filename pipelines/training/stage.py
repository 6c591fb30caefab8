"""One stage, as every worker runs it: load, accumulate, apply or skip the step, validate, checkpoint, report."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train.collective import broadcast_from_rank_zero
from torch import nn

from datasets_etl.batches import FlowBatch
from datasets_etl.errors import DataError
from datasets_etl.loader import PositionDataset, TrainingStream
from datasets_etl.manifest import Manifest
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from gmflow import GMFlow
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from pipelines.errors import LASTING_ERRORS, PipelineError
from pipelines.training.checkpoints import CheckpointStore, CheckpointWriter, KeepPolicy, initial_model
from pipelines.training.config import StageConfig
from pipelines.training.feed import FeedWriter, Record
from pipelines.training.group import WorkerGroup
from pipelines.training.interval import StepTotals
from pipelines.training.machine_config import MachineConfig
from pipelines.training.memory import peak_bytes
from pipelines.training.pictures import comparison_png
from pipelines.training.state import TrainingState, newest_metrics
from pipelines.training.step import TrainingStep
from pipelines.training.validation import validate
from pipelines.training.watchdog import Watchdog
from pipelines.training.worker_log import WorkerLog, log_line
from pipelines.wording import counted

# How often a long validation reports its progress.
_VALIDATION_NEWS_S = 30.0


@dataclass(frozen=True)
class StageJob:
    """Everything a worker needs to know.

    Attributes:
        stage, machine: these sections of the config.
        data: dataset name → manifest URL.
        folder: URL of the stage's folder on storage; it holds the initial weights, and checkpoints are written there.
        feed: name of the queue the driver listens to.
        seed: seed of sample order and augmentation.
        precision: what products are computed in.
    """

    stage: StageConfig
    machine: MachineConfig
    data: dict[str, str]
    folder: str
    feed: str
    seed: int
    precision: Precision


def train_stage(config: dict[str, Any]) -> None:
    """Ray Train runs this on every worker: from the newest checkpoint to the end, or until a preemption notice.

    Ray restarts all workers after any error. After a permanent one (`LASTING_ERRORS`) the restarted workers return at
    once, and the driver raises it.
    """
    job: StageJob = config["job"]
    os.environ[PATIENCE_VARIABLE] = str(job.machine.storage_patience_s)  # loader processes inherit it
    feed = FeedWriter(job.feed)
    if feed.gave_up_for() is not None:
        return
    rank = ray.train.get_context().get_world_rank()

    def tell(step: int, text: str) -> None:
        feed.send(Record(step, line=log_line(job.stage, step, rank, text)))

    watchdog = Watchdog(job.machine.hang_timeout_s, tell, feed.live)
    try:
        with watchdog.watching():
            _train(_Worker(job, feed, watchdog))
    except LASTING_ERRORS as error:
        feed.give_up(error)
        raise


def _train(worker: "_Worker") -> None:
    worker.resume()
    staying = worker.validate_when_due()  # in case the previous attempt ended before its validation did
    for step, batches in worker.stream() if staying else ():
        sums = worker.step.accumulate(batches)
        totals = worker.step.update(sums)
        worker.state.step = step + 1
        worker.track(totals)
        worker.checkpoint_when_due()
        if not worker.validate_when_due() or (sums.ask_for_notice and worker.must_leave()):
            break
    worker.finish()


class _Worker:
    """One worker of a stage: what its loop is built from, and when each part of it is due."""

    def __init__(self, job: StageJob, feed: FeedWriter, watchdog: Watchdog) -> None:
        watchdog.progress("reading manifests and initial weights", 0)
        self.job = job
        self.feed = feed
        self.group = WorkerGroup()
        self._open_data()
        self.checkpoints = CheckpointStore(open_store(job.folder))
        model = initial_model(self.checkpoints.folder).to(self.group.device)
        self.state = TrainingState.fresh(model, job.stage, job.precision)
        self.log = WorkerLog(job.stage, self.group.rank, self.state, feed, watchdog)
        self.step = TrainingStep(job.stage, self.state, self._prepare(model), self.group, self.log)
        best = None if job.stage.keep_best is None else job.stage.keep_best.name
        self.writer = CheckpointWriter(self.checkpoints, KeepPolicy(job.stage.keep_last, best), self.log.warn)
        self.checkpointed = (-1, -1)  # step and validation of the newest snapshot handed to the writer
        if self.cache is not None and self.group.first_on_node and (trouble := self.cache.trouble()):
            self.log.warn(f"machine.cache keeps nothing, so every sample is read from storage each time: {trouble}")

    def _open_data(self) -> None:
        job, stage = self.job, self.job.stage
        manifests = {name: Manifest.load(url) for name, url in job.data.items()}
        self.cache = job.machine.cache.build() if job.machine.cache else None
        mixture = [part.build(manifests[part.data], stage.crop) for part in stage.mixture]
        self.dataset = PositionDataset(mixture, seed=job.seed, cache=self.cache)
        self.validation = {
            chosen.name: chosen.build(manifests[chosen.data], cache=self.cache) for chosen in stage.validation
        }

    def _prepare(self, model: GMFlow) -> nn.Module:
        """The model as training runs it. The averaged one only validates, so it needs no gradients and no DDP."""
        execution = self.job.machine.execution(self.job.precision, ddp=self.group.world_size > 1)
        if self.state.average is not None:
            average = self.state.average.module
            assert isinstance(average, GMFlow)
            prepare_model(average, ExecutionConfig(precision=self.job.precision, replay=execution.replay))
        return prepare_model(model, execution)

    def resume(self) -> None:
        """Resume from the newest undamaged checkpoint; rank 0 chooses it for all ranks."""
        self.log.progress("looking for the newest checkpoint, or waiting for rank 0 to")
        saved = self.checkpoints.newest(self.log.warn) if self.group.rank == 0 else None
        step = broadcast_from_rank_zero(None if saved is None else saved["step"])
        if step is None:
            self.log.say(f"starts: {self._sizes()}")
            return
        self.log.progress("reading the checkpoint")
        self.state.restore(saved or self._read_by_others(step))
        self.checkpointed = self.state.step, self.state.validated
        if self.group.rank == 0:
            for recorded_step, metrics in self.state.records:
                self.feed.send(Record(recorded_step, metrics))
        self.log.say(f"resumes: {self._sizes()}")

    def _read_by_others(self, step: int) -> dict[str, Any]:
        """The checkpoint that rank 0 could read. If this rank cannot, Ray restarts all workers, to choose again."""
        try:
            return self.checkpoints.read(step)
        except PipelineError as error:
            raise DataError(str(error)) from error

    def _sizes(self) -> str:
        stage = self.job.stage
        return (
            f"{self.dataset.order.epoch_length} samples an epoch, global batch {stage.global_batch} on "
            f"{counted(self.group.world_size, 'worker')}, {counted(stage.steps, 'step')}"
        )

    def stream(self) -> Iterator[tuple[int, Iterator[FlowBatch]]]:
        """Every step still to run, each with this rank's micro-batches."""
        yield from TrainingStream(
            self.dataset,
            range(self.state.step, self.job.stage.steps),
            global_batch=self.job.stage.global_batch,
            micro_batch=self.job.machine.micro_batch,
            rank=self.group.rank,
            world_size=self.group.world_size,
            workers=self.job.machine.loader_workers,
            pinned=self.group.device.type == "cuda",
        )

    def track(self, totals: StepTotals) -> None:
        """Record and send the metrics of the steps since the last record, when a record is due."""
        stage, state = self.job.stage, self.state
        state.interval.add(totals)
        if state.step % stage.log_every and state.step != stage.steps:
            return
        metrics = state.interval.metrics(stage.global_batch)
        metrics["train/lr"] = float(state.schedule.get_last_lr()[0])
        metrics["train/skipped_steps"] = float(state.skipped)
        metrics["system/memory_gib"] = peak_bytes(self.group.device) / 2**30
        state.interval = state.interval.following()
        state.record(state.step, metrics)
        self.log.say(_shown(metrics, steps_left=stage.steps - state.step), metrics)

    def validate_when_due(self) -> bool:
        """Validate on every set if it is due. False if the workers leave meanwhile; the next attempt repeats it."""
        if not self._validation_is_due():
            return True
        self.log.progress("validating")
        metrics: dict[str, float] = {}
        pictures: dict[str, bytes] = {}
        model = self.state.result
        assert isinstance(model, GMFlow)
        for name, evaluation in self.validation.items():
            on_scored = self._validation_news(name, len(evaluation))
            scored = validate(model, evaluation, self.group, on_scored, self._leaves_meanwhile)
            if scored is None:
                return False
            scores, first = scored
            # A metric of a speed range without any pixel is NaN: it is left out.
            metrics |= {f"val/{name}/{metric}": value for metric, value in scores.items() if not math.isnan(value)}
            if first is not None and self.group.rank == 0:
                pictures[f"{name.replace('/', '_')}_step_{self.state.step:06d}.png"] = comparison_png(first)
        self.state.validated = self.state.step
        self._keep_validation(metrics, pictures)
        return True

    def _validation_is_due(self) -> bool:
        stage, step = self.job.stage, self.state.step
        asked = step == stage.steps or (stage.validate_every is not None and step % stage.validate_every == 0)
        return asked and self.state.validated != step

    def _keep_validation(self, metrics: dict[str, float], pictures: dict[str, bytes]) -> None:
        if metrics:
            self.state.record(self.state.step, metrics)
            shown = " ".join(f"{name}={value:.3f}" for name, value in metrics.items() if name.endswith("/epe"))
            self.log.say(f"validated {shown}", metrics, pictures)
        if self._checkpoint_is_due() or self.job.stage.keep_best is not None:
            self._checkpoint(metrics)  # replaces the one this step wrote before the validation, if any
        self._report()

    def _validation_news(self, name: str, total: int) -> Callable[[int], None]:
        """A function that is called with the number of scored samples, and says it from time to time."""
        since = time.monotonic()

        def on_scored(done: int) -> None:
            nonlocal since
            if self.log.progress(f"validating on {name}") - since > _VALIDATION_NEWS_S:
                since = time.monotonic()
                self.log.say(f"validating on {name}: {done} of {total}")

        return on_scored

    def _leaves_meanwhile(self) -> bool:
        """Whether the workers leave, asked between the samples of a validation. A collective."""
        return self.group.any_rank(self.group.notice_check_due()) and self.must_leave()

    def checkpoint_when_due(self) -> None:
        """Runs before a validation, which may take longer than a machine with a preemption notice has left."""
        if self._checkpoint_is_due():
            self._checkpoint({})
            if not self._validation_is_due():  # a validation reports itself, and each step reports once
                self._report()

    def _checkpoint_is_due(self) -> bool:
        return self.state.step == self.job.stage.steps or self.state.step % self.job.stage.checkpoint_every == 0

    def _checkpoint(self, validated: dict[str, float]) -> None:
        """Rank 0 hands the writer a snapshot with this step's validation metrics, unless the writer already has it."""
        state = self.state
        if self.group.rank == 0 and self.checkpointed != (state.step, state.validated):
            self.writer.submit(state.snapshot(), validated)
            self.checkpointed = state.step, state.validated

    def _report(self) -> None:
        """All ranks report to Ray; Ray Tune bases its decisions on these metrics."""
        ray.train.report(newest_metrics(self.state.records, self.state.step) | {"step": self.state.step})
        self.state.interval.restart_clock()

    def must_leave(self) -> bool:
        """Whether Ray has a preemption notice for a machine of this group. If so, checkpoint: all ranks will leave."""
        notice = self.group.preemption_notice()
        if notice is None:
            return False
        ranks = ", ".join(map(str, notice.preempted_ranks))
        self.log.say(f"leaves: the machine of worker {ranks} is about to be taken away")
        self._checkpoint({})
        if self.group.rank == 0:
            self.feed.depart()
        return True

    def finish(self) -> None:
        """Wait until the newest checkpoint is stored. Raises the error of its write if that failed."""
        self.log.progress("writing the last checkpoint")
        self.writer.flush()
        self.writer.close()


def _shown(metrics: dict[str, float], steps_left: int) -> str:
    """The metrics of a record that a person watches, and the time left, as text."""
    loss, epe = (metrics.get(f"train/{name}", math.nan) for name in ("loss", "epe"))  # NaN: all steps were skipped
    text = f"loss={loss:.3f} epe={epe:.3f} lr={metrics['train/lr']:.2e}"
    step_s = metrics.get("time/step_s")
    if step_s is None:
        return text
    minutes, seconds = divmod(int(steps_left * step_s), 60)
    return (
        f"{text} samples/s={metrics['time/samples_per_s']:.1f} wait={100 * metrics['time/data_wait']:.0f}%"
        f" eta={minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    )
