"""One stage, as every worker runs it: load, accumulate, apply or skip the step, validate, checkpoint, report."""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray.train
import torch
import torch.distributed as dist
from ray.train.collective import broadcast_from_rank_zero
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets_etl.errors import DataError
from datasets_etl.loader import FlowBatch, PositionDataset, TrainingStream
from datasets_etl.manifest import Manifest
from datasets_etl.storage import open_store
from datasets_etl.storage_retries import PATIENCE_VARIABLE
from gmflow import GMFlow
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.loss import sequence_loss
from gmflow.metrics import ErrorMetrics
from pipelines.errors import LASTING_ERRORS, PipelineError
from pipelines.training.checkpoints import CheckpointStore, CheckpointWriter, KeepPolicy, initial_model
from pipelines.training.config import MachineConfig, StageConfig
from pipelines.training.feed import FeedWriter, Record
from pipelines.training.interval import StepTotals
from pipelines.training.memory import peak_bytes
from pipelines.training.pictures import comparison_png
from pipelines.training.state import TrainingState, newest_metrics
from pipelines.training.validation import validate
from pipelines.training.watchdog import Watchdog

log = logging.getLogger(__name__)

# The ranks ask Ray only this often whether one of their machines has a preemption notice: asking is a collective.
_LOOK_OUT_S = 2.0
# So many records are sent again with the next one: more than are made while the driver does not look at its queue.
_SENT_AGAIN = 10
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
        feed.send(Record(step, line=_line(job, step, rank, text)))

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
        sums = worker.accumulate(batches)
        totals = worker.update(sums)
        worker.state.step = step + 1
        worker.track(totals)
        worker.checkpoint_when_due()
        if not worker.validate_when_due() or (sums.look_out and worker.must_leave()):
            break
    worker.finish()


class _StepSums(NamedTuple):
    """Totals of one step over all ranks, the same on each rank. `data_wait` (s) is that of the longest-waiting rank."""

    loss: float
    metrics: ErrorMetrics
    look_out: bool
    data_wait: float


class _Worker:
    def __init__(self, job: StageJob, feed: FeedWriter, watchdog: Watchdog) -> None:
        watchdog.progress("reading manifests and initial weights", 0)
        context = ray.train.get_context()
        self.job = job
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.feed = feed
        self.watchdog = watchdog
        manifests = {name: Manifest.load(url) for name, url in job.data.items()}
        stage = job.stage
        cache = job.machine.cache.build() if job.machine.cache else None
        self.dataset = PositionDataset(
            [part.build(manifests[part.data], stage.crop) for part in stage.mixture],
            seed=job.seed,
            cache=cache,
        )
        self.validation = {
            chosen.name: chosen.build(manifests[chosen.data], cache=cache) for chosen in stage.validation
        }
        self.checkpoints = CheckpointStore(open_store(job.folder))
        self.model = initial_model(self.checkpoints.folder).to(self.device)
        self.state = TrainingState.fresh(self.model, stage, job.precision)
        self.prepared = self._prepare()
        best = None if stage.keep_best is None else stage.keep_best.name
        self.writer = CheckpointWriter(self.checkpoints, KeepPolicy(stage.keep_last, best), self._warn)
        self.checkpointed = (-1, -1)  # step and validation of the newest snapshot handed to the writer
        self.looked_out = time.monotonic()
        if cache is not None and context.get_local_rank() == 0 and (trouble := cache.trouble()):
            self._warn(f"machine.cache keeps nothing, so every sample is read from storage each time: {trouble}")

    def _prepare(self) -> nn.Module:
        execution = self.job.machine.execution(self.job.precision, ddp=self.world_size > 1)
        if self.state.average is not None:
            average = self.state.average.module
            assert isinstance(average, GMFlow)
            prepare_model(average, ExecutionConfig(precision=self.job.precision, replay=execution.replay))
        return prepare_model(self.model, execution)

    def resume(self) -> None:
        """Resume from the newest undamaged checkpoint; rank 0 chooses it for all ranks."""
        self.watchdog.progress("looking for the newest checkpoint, or waiting for rank 0 to", 0)
        saved = self.checkpoints.newest(self._warn) if self.rank == 0 else None
        step = broadcast_from_rank_zero(None if saved is None else saved["step"])
        if step is None:
            self._say(f"starts: {self._sizes()}")
            return
        self.watchdog.progress("reading the checkpoint", step)
        self.state.restore(saved or self._read_by_others(step))
        self.checkpointed = self.state.step, self.state.validated
        if self.rank == 0:
            for told, metrics in self.state.records:
                self.feed.send(Record(told, metrics))
        self._say(f"resumes: {self._sizes()}")

    def _read_by_others(self, step: int) -> dict[str, Any]:
        """The checkpoint that rank 0 could read. If this rank cannot, Ray restarts all workers, to choose again."""
        try:
            return self.checkpoints.read(step)
        except PipelineError as error:
            raise DataError(str(error)) from error

    def stream(self) -> Iterator[tuple[int, Iterator[FlowBatch]]]:
        """Every step still to run, each with this rank's micro-batches."""
        yield from TrainingStream(
            self.dataset,
            range(self.state.step, self.job.stage.steps),
            global_batch=self.job.stage.global_batch,
            micro_batch=self.job.machine.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            workers=self.job.machine.loader_workers,
            pinned=self.device.type == "cuda",
        )

    def accumulate(self, batches: Iterator[FlowBatch]) -> _StepSums:
        """Run forward and backward passes over the micro-batches; the last backward pass all-reduces the gradients."""
        stage = self.job.stage
        self.prepared.train()
        self.state.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics = ErrorMetrics()
        waited = 0.0
        before = self._next_is("waiting for data")
        batch = next(batches, None)
        while batch is not None:
            current = FlowBatch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
            following = next(batches, None)
            waited += self._next_is("computing, or waiting for another worker") - before
            with self._gradient_sync(last=following is None):
                predictions = self.prepared(current.image0.float(), current.image1.float()).predictions
                loss = sequence_loss(
                    predictions,
                    current.flow,
                    current.valid,
                    gamma=stage.gamma,
                    max_flow=stage.max_flow,
                    # DDP averages over ranks; with this divisor that average is the mean over the global batch.
                    normalizer=stage.global_batch / self.world_size,
                )
                self.state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach() / self.world_size
            metrics.update(predictions[-1].detach(), current.flow, current.valid)
            before = self._next_is("waiting for data")
            batch = following
        return self._over_ranks(loss_sum, metrics, waited)

    def _gradient_sync(self, *, last: bool) -> Any:
        if last or not isinstance(self.prepared, DistributedDataParallel):
            return nullcontext()
        return self.prepared.no_sync()

    def _over_ranks(self, loss_sum: torch.Tensor, metrics: ErrorMetrics, waited: float) -> _StepSums:
        """All-reduce the sums, and whether to look for a preemption notice now; rank 0's clock decides for all."""
        now = self._next_is("waiting for the other workers")
        look_out = self.rank == 0 and now - self.looked_out > _LOOK_OUT_S
        waits = loss_sum.new_zeros(self.world_size)
        waits[self.rank] = waited
        own = [loss_sum[None], loss_sum.new_tensor([float(look_out)]), metrics.state().to(self.device), waits]
        sums = torch.cat(own)
        if self.world_size > 1:
            dist.all_reduce(sums)
        loss, leaving, *_ = sums = sums.cpu()
        errors, waits = sums[2:].tensor_split([-self.world_size])
        return _StepSums(float(loss), ErrorMetrics.from_state(errors), bool(leaving), float(waits.max()))

    def update(self, sums: _StepSums) -> StepTotals:
        """Clip and step, unless loss or gradient norm is not finite. All ranks have the same values, so they agree."""
        state = self.state
        state.scaler.unscale_(state.optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.job.stage.clip_norm))
        if applied := math.isfinite(sums.loss) and math.isfinite(norm):
            state.scaler.step(state.optimizer)
            if state.average is not None:
                state.average.update_parameters(self.model)
            state.skipped_in_a_row = 0
        else:
            self._skip(sums.loss, norm)
        state.scaler.update()
        state.schedule.step()
        return StepTotals(sums.loss, sums.metrics, norm, applied, sums.data_wait)

    def _skip(self, loss: float, norm: float) -> None:
        state, stage = self.state, self.job.stage
        state.skipped += 1
        # With fp16, the scaler finds its scale by trying values that prove too large: such skips do not count.
        searching = state.scaler.is_enabled() and math.isfinite(loss) and state.scaler.get_scale() > 1
        state.skipped_in_a_row += not searching
        self._say(f"skipped: loss {loss}, gradient norm {norm}")
        if state.skipped_in_a_row >= stage.max_skipped_in_a_row:
            raise PipelineError(
                f"stage {stage.name}: {state.skipped_in_a_row} steps in a row with a non-finite loss or gradient, "
                f"the last at step {state.step}; lower peak_lr or look at the data"
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
        metrics["system/memory_gib"] = peak_bytes(self.device) / 2**30
        state.interval = state.interval.following()
        state.record(state.step, metrics)
        loss, epe = (metrics.get(f"train/{name}", math.nan) for name in ("loss", "epe"))  # NaN: all were skipped
        told = f"loss={loss:.3f} epe={epe:.3f} lr={metrics['train/lr']:.2e}"
        if (step_s := metrics.get("time/step_s")) is not None:
            left = (stage.steps - state.step) * step_s
            told += (
                f" samples/s={metrics['time/samples_per_s']:.1f} wait={100 * metrics['time/data_wait']:.0f}%"
                f" eta={int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
            )
        self._say(told, metrics)

    def validate_when_due(self) -> bool:
        """Validate on every set if it is due. False if the workers leave meanwhile; the next attempt repeats it."""
        if not self._validation_is_due():
            return True
        step = self.state.step
        self._next_is("validating")
        found: dict[str, float] = {}
        pictures: dict[str, bytes] = {}
        for name, evaluation in self.validation.items():
            result, news = self.state.result, self._validation_news(name, len(evaluation))
            assert isinstance(result, GMFlow)
            scored = validate(result, evaluation, self.device, self.rank, self.world_size, news, self._leaves_meanwhile)
            if scored is None:
                return False
            scores, first = scored
            # A metric of a speed range without any pixel is NaN: it is left out.
            found |= {f"val/{name}/{metric}": v for metric, v in scores.items() if not math.isnan(v)}
            if first is not None and self.rank == 0:
                pictures[f"{name.replace('/', '_')}_step_{step:06d}.png"] = comparison_png(first)
        self.state.validated = step
        self._keep_validation(found, pictures)
        return True

    def _validation_is_due(self) -> bool:
        stage, step = self.job.stage, self.state.step
        asked = step == stage.steps or (stage.validate_every is not None and step % stage.validate_every == 0)
        return asked and self.state.validated != step

    def _keep_validation(self, found: dict[str, float], pictures: dict[str, bytes]) -> None:
        stage, state = self.job.stage, self.state
        if found:
            state.record(state.step, found)
            shown = " ".join(f"{name}={value:.3f}" for name, value in found.items() if name.endswith("/epe"))
            self._say(f"validated {shown}", found, pictures)
        if self._checkpoint_is_due() or stage.keep_best is not None:
            self._checkpoint(found)  # replaces the one this step wrote before the validation, if any
        self._report()

    def _leaves_meanwhile(self) -> bool:
        """Whether the workers leave, asked between the samples of a validation. A collective."""
        look_out = torch.tensor(float(self.rank == 0 and time.monotonic() - self.looked_out > _LOOK_OUT_S))
        if self.world_size > 1:
            look_out = look_out.to(self.device)
            dist.all_reduce(look_out)
        return bool(look_out) and self.must_leave()

    def _validation_news(self, name: str, total: int) -> Any:
        since = time.monotonic()

        def tell(done: int) -> None:
            nonlocal since
            if self._next_is(f"validating on {name}") - since > _VALIDATION_NEWS_S:
                since = time.monotonic()
                self._say(f"validating on {name}: {done} of {total}")

        return tell

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
        if self.rank == 0 and self.checkpointed != (state.step, state.validated):
            self.writer.submit(state.snapshot(), validated)
            self.checkpointed = state.step, state.validated

    def _report(self) -> None:
        """All ranks report to Ray; Ray Tune bases its decisions on these metrics."""
        ray.train.report(newest_metrics(self.state.records, self.state.step) | {"step": self.state.step})
        self.state.interval.restart_clock()

    def must_leave(self) -> bool:
        """Whether Ray has a preemption notice for a machine of this group. If so, checkpoint: all ranks will leave."""
        self.looked_out = time.monotonic()
        notice = ray.train.get_preemption_info()
        if notice is None:
            return False
        self._say(
            f"leaves: the machine of worker {', '.join(map(str, notice.preempted_ranks))} is about to be taken away"
        )
        self._checkpoint({})
        if self.rank == 0:
            self.feed.depart()
        return True

    def finish(self) -> None:
        """Wait until the newest checkpoint is stored. Raises the error of its write if that failed."""
        self._next_is("writing the last checkpoint")
        self.writer.flush()
        self.writer.close()

    def _next_is(self, doing: str) -> float:
        """Tell the watchdog what this worker does next; returns the current monotonic time, in seconds."""
        self.watchdog.progress(doing, self.state.step)
        return time.monotonic()

    def _sizes(self) -> str:
        stage = self.job.stage
        return (
            f"{self.dataset.order.epoch_length} samples an epoch, global batch {stage.global_batch} on "
            f"{self.world_size} workers, {stage.steps} steps"
        )

    def _say(
        self, text: str, metrics: dict[str, float] | None = None, pictures: dict[str, bytes] | None = None
    ) -> None:
        """Log on every rank; only rank 0 sends the message to the driver."""
        line = self._line(text)
        log.info(line)
        if self.rank == 0:
            earlier = tuple(self.state.records[-_SENT_AGAIN - 1 : -1]) if metrics else ()
            self.feed.send(Record(self.state.step, metrics or {}, line, pictures or {}, earlier))

    def _warn(self, text: str) -> None:
        """Log a warning and send it to the driver, for this rank alone."""
        line = self._line(text)
        log.warning(line)
        self.feed.send(Record(self.state.step, line=line))

    def _line(self, text: str) -> str:
        return _line(self.job, self.state.step, self.rank, text)


def _line(job: StageJob, step: int, rank: int, text: str) -> str:
    return f"stage={job.stage.name} step={step}/{job.stage.steps} rank={rank} {text}"
