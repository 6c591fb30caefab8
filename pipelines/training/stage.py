"""One stage, as every worker runs it: load, accumulate, decide, step, validate, checkpoint, report."""

import logging
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets_etl.loader import EvaluationSet, FlowBatch, MixturePart, PositionDataset, TrainingStream
from datasets_etl.manifest import Manifest
from datasets_etl.storage import open_store
from gmflow import GMFlow, load_model
from gmflow.execution import ExecutionConfig, Precision, prepare_model
from gmflow.loss import sequence_loss
from gmflow.metrics import FlowMetrics
from pipelines.errors import PipelineError
from pipelines.training.config import MachineConfig, StageConfig
from pipelines.training.feed import FeedWriter, Record
from pipelines.training.pictures import comparison_png
from pipelines.training.state import TrainingState
from pipelines.training.validation import validate

log = logging.getLogger(__name__)

INITIAL_WEIGHTS = "init.safetensors"


@dataclass(frozen=True)
class StageJob:
    """All a worker needs to know.

    Attributes:
        stage, machine: from the config.
        data: name → manifest URL.
        folder: URL of the stage's folder on storage; its initial weights lie there.
        feed: name of the queue the driver listens to.
        seed: of order and augmentation.
        precision: of the forward pass.
    """

    stage: StageConfig
    machine: MachineConfig
    data: dict[str, str]
    folder: str
    feed: str
    seed: int
    precision: Precision


def train_stage(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker. Resumes from Ray's newest checkpoint where there is one."""
    worker = _Worker(config["job"])
    worker.resume()
    for step, batches in worker.stream():
        totals = worker.accumulate(batches)
        worker.update(totals)
        worker.state.step = step + 1
        worker.track(totals)
        worker.validate_when_due()
        worker.checkpoint_when_due()


@dataclass
class _Totals:
    """Sums of one step over all ranks, and where its time went (seconds, this rank)."""

    loss: float
    metrics: FlowMetrics
    data_wait: float
    grad_norm: float = float("nan")


class _Worker:
    def __init__(self, job: StageJob) -> None:
        context = ray.train.get_context()
        self.job = job
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.feed = FeedWriter(job.feed)
        manifests = {name: Manifest.load(url) for name, url in job.data.items()}
        stage = job.stage
        self.dataset = PositionDataset(
            [
                MixturePart(manifests[part.data], part.subset, part.repeats, part.augmentation(stage.crop))
                for part in stage.mixture
            ],
            seed=job.seed,
        )
        self.validation = {
            chosen.name: EvaluationSet(manifests[chosen.data], chosen.subset, chosen.limit)
            for chosen in stage.validation
        }
        self.model = _initial_model(job).to(self.device)
        self.prepared = prepare_model(
            self.model,
            ExecutionConfig(
                precision=job.precision,
                checkpointing=job.machine.checkpointing,
                compile=job.machine.compile,
                ddp=self.world_size > 1,
            ),
        )
        self.state = TrainingState.fresh(self.model, stage)
        self.skipped_in_a_row = 0
        self.since_log = _Interval()

    def resume(self) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            self._say(f"starts: {self._sizes()}")
            return
        with checkpoint.as_directory() as folder:
            self.state.restore(Path(folder))
        if self.rank == 0:
            for step, metrics in self.state.records:
                self.feed.send(Record(step, metrics))
        self._say(f"resumes: {self._sizes()}")

    def stream(self) -> Iterator[tuple[int, Iterator[FlowBatch]]]:
        """Every step still to run with this rank's micro-batches."""
        yield from TrainingStream(
            self.dataset,
            range(self.state.step, self.job.stage.steps),
            global_batch=self.job.stage.global_batch,
            micro_batch=self.job.machine.micro_batch,
            rank=self.rank,
            world_size=self.world_size,
            workers=self.job.machine.loader_workers,
        )

    def accumulate(self, batches: Iterator[FlowBatch]) -> _Totals:
        """Forward and backward over the micro-batches; gradients meet in the last one's backward."""
        stage = self.job.stage
        self.prepared.train()
        self.state.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        metrics = FlowMetrics()
        waited = 0.0
        before = time.perf_counter()
        batch = next(batches, None)
        while batch is not None:
            current = FlowBatch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))
            following = next(batches, None)
            waited += time.perf_counter() - before
            with self._gradient_sync(last=following is None):
                predictions = self.prepared(current.image0.float(), current.image1.float()).predictions
                loss = sequence_loss(
                    predictions,
                    current.flow,
                    current.valid,
                    gamma=stage.gamma,
                    max_flow=stage.max_flow,
                    # DDP averages over ranks: with this divisor the average is the mean over the global batch.
                    normalizer=stage.global_batch / self.world_size,
                )
                loss.backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach() / self.world_size
            metrics.update(predictions[-1].detach(), current.flow, current.valid)
            before = time.perf_counter()
            batch = following
        return self._over_ranks(loss_sum, metrics, waited)

    def _gradient_sync(self, *, last: bool) -> Any:
        if last or not isinstance(self.prepared, DistributedDataParallel):
            return nullcontext()
        return self.prepared.no_sync()

    def _over_ranks(self, loss_sum: torch.Tensor, metrics: FlowMetrics, waited: float) -> _Totals:
        sums = torch.cat([loss_sum[None], metrics.state().to(self.device)])
        if self.world_size > 1:
            dist.all_reduce(sums)
        sums = sums.cpu()
        return _Totals(float(sums[0]), FlowMetrics.from_state(sums[1:]), waited)

    def update(self, totals: _Totals) -> None:
        """Clip and step, unless loss or gradients are not finite: all ranks hold the same sums, so they agree."""
        stage = self.job.stage
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), stage.clip_norm)
        totals.grad_norm = float(norm)
        if math.isfinite(totals.loss) and math.isfinite(totals.grad_norm):
            self.state.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.state.skipped += 1
            self.skipped_in_a_row += 1
            self._say(f"skipped: loss {totals.loss}, gradient norm {totals.grad_norm}")
            if self.skipped_in_a_row >= stage.max_skipped_in_a_row:
                raise PipelineError(
                    f"stage {stage.name}: {self.skipped_in_a_row} steps in a row with a non-finite loss or gradient, "
                    f"the last at step {self.state.step}; lower peak_lr or look at the data"
                )
        self.state.schedule.step()

    def track(self, totals: _Totals) -> None:
        """Metrics of the steps since the last record, when one is due."""
        self.since_log.add(totals)
        stage, step = self.job.stage, self.state.step
        if step % stage.log_every and step != stage.steps:
            return
        metrics = self.since_log.metrics(stage.global_batch)
        metrics["train/lr"] = float(self.state.schedule.get_last_lr()[0])
        metrics["train/skipped_steps"] = float(self.state.skipped)
        self.since_log = _Interval()
        self.state.record(step, metrics)
        left = (stage.steps - step) * metrics["time/step_s"]
        self._say(
            f"loss={metrics['train/loss']:.3f} epe={metrics['train/epe']:.3f} lr={metrics['train/lr']:.2e} "
            f"samples/s={metrics['time/samples_per_s']:.1f} wait={100 * metrics['time/data_wait']:.0f}% "
            f"eta={int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}",
            metrics,
        )

    def validate_when_due(self) -> None:
        stage, step = self.job.stage, self.state.step
        if step != stage.steps and (stage.validate_every is None or step % stage.validate_every):
            return
        metrics: dict[str, float] = {}
        pictures: dict[str, bytes] = {}
        for name, evaluation in self.validation.items():
            scores, first = validate(self.model, evaluation, self.device, self.rank, self.world_size)
            # A speed range without a pixel has no figure.
            metrics |= {f"val/{name}/{metric}": value for metric, value in scores.items() if not math.isnan(value)}
            if first is not None and self.rank == 0:
                pictures[f"{name.replace('/', '_')}_step_{step:06d}.png"] = comparison_png(first)
        if metrics:
            self.state.record(step, metrics)
            shown = " ".join(f"{name}={value:.3f}" for name, value in metrics.items() if name.endswith("/epe"))
            self._say(f"validated {shown}", metrics, pictures)
        self.since_log.restart()

    def checkpoint_when_due(self) -> None:
        """Hand the state to Ray, which uploads it; every rank reports, rank 0 with the files."""
        stage, step = self.job.stage, self.state.step
        if step % stage.checkpoint_every and step != stage.steps:
            return
        with tempfile.TemporaryDirectory(prefix="gmflow-checkpoint-") as folder:
            checkpoint = None
            if self.rank == 0:
                self.state.save(Path(folder))
                checkpoint = Checkpoint.from_directory(folder)
            latest = {name: value for _, metrics in self.state.records for name, value in metrics.items()}
            ray.train.report(latest | {"step": step}, checkpoint=checkpoint)
        self.since_log.restart()

    def _sizes(self) -> str:
        stage = self.job.stage
        return (
            f"{self.dataset.order.epoch_length} samples an epoch, global batch {stage.global_batch} on "
            f"{self.world_size} workers, {stage.steps} steps"
        )

    def _say(
        self, text: str, metrics: dict[str, float] | None = None, pictures: dict[str, bytes] | None = None
    ) -> None:
        stage = self.job.stage
        line = f"stage={stage.name} step={self.state.step}/{stage.steps} rank={self.rank} {text}"
        log.info(line)
        if self.rank == 0:
            self.feed.send(Record(self.state.step, metrics or {}, line, pictures or {}))


class _Interval:
    """Sums over the steps since the last record."""

    def __init__(self) -> None:
        self.steps = 0
        self.loss = 0.0
        self.grad_norm = 0.0
        self.data_wait = 0.0
        self.seconds = 0.0
        self.scores = FlowMetrics()
        self._since = time.perf_counter()

    def add(self, totals: _Totals) -> None:
        self.steps += 1
        self.loss += totals.loss
        self.grad_norm += totals.grad_norm
        self.data_wait += totals.data_wait
        self.scores.merge(totals.metrics)
        self.seconds += time.perf_counter() - self._since
        self.restart()

    def restart(self) -> None:
        """Time from here on belongs to the next step."""
        self._since = time.perf_counter()

    def metrics(self, global_batch: int) -> dict[str, float]:
        scores = self.scores.compute()
        return {
            "train/loss": self.loss / self.steps,
            "train/grad_norm": self.grad_norm / self.steps,
            **{f"train/{name}": scores[name] for name in ("epe", "px1", "px3", "px5")},
            "time/step_s": self.seconds / self.steps,
            "time/samples_per_s": self.steps * global_batch / self.seconds,
            "time/data_wait": self.data_wait / self.seconds,
        }


def _initial_model(job: StageJob) -> GMFlow:
    """The stage's initial weights, from its folder."""
    with tempfile.TemporaryDirectory(prefix="gmflow-init-") as folder:
        path = Path(folder) / INITIAL_WEIGHTS
        path.write_bytes(open_store(job.folder).read(INITIAL_WEIGHTS))
        return load_model(path)
