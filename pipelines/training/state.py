"""Everything an exact resume needs, as a value that can be copied, stored and restored."""

import copy
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gmflow.execution import Precision
from pipelines.errors import PipelineError
from pipelines.training.config import StageConfig
from pipelines.training.interval import Interval

# A checkpoint holds this many of the newest records: on resume they are sent again, in case a dying driver lost them.
_REMEMBERED_RECORDS = 200

# The schedule is this many steps longer than the training, as in the reference implementation.
_SCHEDULE_MARGIN = 10


@dataclass
class TrainingState:
    """Model, optimiser, schedule and position of a stage.

    Attributes:
        model: the bare model, without any wrapper.
        optimizer: AdamW over its parameters.
        schedule: one-cycle learning rate; it advances once a step, on skipped steps too.
        scaler: scales the loss for fp16; for other precisions it changes nothing.
        average: exponential moving average of the weights, if the stage keeps one.
        step: the next step to run; the position in the data stream is step · global batch.
        validated: the step of the newest validation.
        skipped: number of steps whose update was left out because a loss or gradient was not finite.
        skipped_in_a_row: those of them since the last update, without the ones that only lowered the fp16 scale.
        interval: sums over the steps since the newest record.
        records: newest tracked metrics as (step, metrics).
    """

    model: nn.Module
    optimizer: AdamW
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    average: AveragedModel | None = None
    step: int = 0
    validated: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    interval: Interval = field(default_factory=Interval)
    records: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @classmethod
    def fresh(cls, model: nn.Module, stage: StageConfig, precision: Precision = "fp32") -> "TrainingState":
        """A new stage: the given weights with a fresh optimiser and schedule. The model must be on its device."""
        optimizer = AdamW(model.parameters(), lr=stage.peak_lr, weight_decay=stage.weight_decay, fused=True)
        device = next(model.parameters()).device
        return cls(
            model,
            optimizer,
            LambdaLR(optimizer, lambda step: one_cycle(step, stage.steps + _SCHEDULE_MARGIN, stage.warmup)),
            torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
            None if stage.ema_decay is None else _average(model, stage.ema_decay),
        )

    @property
    def result(self) -> nn.Module:
        """The model to validate and register: with the averaged weights if the stage keeps them, else the newest."""
        return self.model if self.average is None else self.average.module

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Remember the metrics of a step; the oldest are forgotten."""
        self.records = [*self.records, (step, metrics)][-_REMEMBERED_RECORDS:]

    def snapshot(self) -> dict[str, Any]:
        """A copy on the CPU of everything needed to resume from here; further training does not change it."""
        return {
            "model": _to_cpu(self.model.state_dict()),
            "optimizer": _to_cpu(self.optimizer.state_dict()),
            "schedule": copy.deepcopy(self.schedule.state_dict()),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else _to_cpu(self.average.state_dict()),
            "step": self.step,
            "validated": self.validated,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "interval": self.interval.state_dict(),
            "records": self.records,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a snapshot. Raises PipelineError if it is of another architecture."""
        try:
            self.model.load_state_dict(saved["model"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
        except RuntimeError as error:
            raise PipelineError(f"checkpoint of step {saved['step']} is of another architecture: {error}") from error
        # `fused` is set even if the checkpoint predates that choice: what a GradScaler expects of an optimiser is
        # decided when the optimiser is built.
        groups = [group | {"fused": True} for group in saved["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict(saved["optimizer"] | {"param_groups": groups})
        self.schedule.load_state_dict(saved["schedule"])
        self.scaler.load_state_dict(saved["scaler"])
        self.interval = Interval.from_state_dict(saved["interval"])
        self.step, self.validated, self.records = saved["step"], saved["validated"], saved["records"]
        self.skipped, self.skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]


def _average(model: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def is_complete(saved: dict[str, Any], steps: int) -> bool:
    """Whether a snapshot is from the end of a stage: trained to the last step, and validated there."""
    return bool(saved["step"] == saved["validated"] == steps)


def result_weights(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of `TrainingState.result`, taken from a snapshot."""
    if saved["average"] is None:
        weights: dict[str, Tensor] = saved["model"]
        return weights
    prefix = "module."
    return {name[len(prefix) :]: value for name, value in saved["average"].items() if name.startswith(prefix)}


def to_bytes(snapshot: dict[str, Any]) -> bytes:
    """The file of a snapshot, see `from_bytes`."""
    buffer = io.BytesIO()
    torch.save(snapshot, buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> dict[str, Any]:
    """The snapshot, on the CPU. Only tensors and plain values are loaded, so a file cannot run code."""
    saved: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return saved


def _to_cpu(value: Any) -> Any:
    """A deep copy with every tensor on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _to_cpu(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_to_cpu(item) for item in value]
    return copy.deepcopy(value)


def one_cycle(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate at a step: up from 1/25, then down to 1/250,000, each along half a cosine.

    The same as PyTorch's `OneCycleLR` without momentum cycling, which would divide by zero if the warm-up ended at
    step 0.
    """
    top = warmup * total - 1
    if step < top:
        return _cosine(1 / 25, 1.0, step / top)
    return _cosine(1.0, 1 / 250_000, (step - top) / (total - 1 - top))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def newest_metrics(records: Sequence[tuple[int, Mapping[str, float]]], step: int) -> dict[str, float]:
    """The newest value of every metric; of validation metrics only those of `step`: older ones are of other weights."""
    newest = {name: value for _, metrics in records for name, value in metrics.items()}
    measured = {name for recorded, metrics in records if recorded == step for name in metrics}
    return {name: value for name, value in newest.items() if name in measured or not name.startswith("val/")}
