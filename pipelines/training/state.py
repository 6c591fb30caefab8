"""Everything an exact resume needs, as one file with its hash."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from pipelines.errors import PipelineError
from pipelines.training.config import StageConfig

FORMAT_VERSION = 1

_STATE_FILE = "state.pt"
_FACTS_FILE = "state.json"

# The newest logged steps travel with a checkpoint: what a dying driver did not hear is said again at resume.
_REMEMBERED_RECORDS = 200


@dataclass
class TrainingState:
    """Model, optimiser, schedule and position of a stage.

    Attributes:
        model: the bare model, without any wrapper.
        optimizer: AdamW over its parameters.
        schedule: one-cycle learning rate, stepped once a step, skipped ones too.
        step: the next step to run; the position in the data stream is step · global batch.
        skipped: steps whose update was left out because a loss or gradient was not finite.
        records: newest tracked metrics as (step, metrics).
    """

    model: nn.Module
    optimizer: AdamW
    schedule: LambdaLR
    step: int = 0
    skipped: int = 0
    records: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @classmethod
    def fresh(cls, model: nn.Module, stage: StageConfig) -> "TrainingState":
        """A new stage: the given weights with a fresh optimiser and schedule."""
        optimizer = AdamW(model.parameters(), lr=stage.peak_lr, weight_decay=stage.weight_decay)
        return cls(model, optimizer, LambdaLR(optimizer, lambda step: one_cycle(step, stage.steps + 10, stage.warmup)))

    def record(self, step: int, metrics: dict[str, float]) -> None:
        self.records = [*self.records, (step, metrics)][-_REMEMBERED_RECORDS:]

    def save(self, folder: Path) -> None:
        """Write the state and then the facts that vouch for it."""
        path = folder / _STATE_FILE
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "step": self.step,
                "skipped": self.skipped,
                "records": self.records,
            },
            path,
        )
        facts = {"format": FORMAT_VERSION, "step": self.step, "torch": torch.__version__, "sha256": _sha256(path)}
        (folder / _FACTS_FILE).write_text(json.dumps(facts))

    def restore(self, folder: Path) -> None:
        """Continue where a checkpoint ended. Raises PipelineError for a damaged one or one of another model."""
        saved = read_checkpoint(folder)
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise PipelineError(f"{folder}: checkpoint of another architecture: {error}") from error
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.step, self.skipped, self.records = saved["step"], saved["skipped"], saved["records"]


def one_cycle(step: int, total: int, warmup: float) -> float:
    """Share of the peak rate at a step: up from 1/25 and down to 1/250,000, both as half a cosine.

    PyTorch's `OneCycleLR` without momentum cycling, which divides by zero where the warm-up ends at step 0.
    """
    top = warmup * total - 1
    if step < top:
        return _cosine(1 / 25, 1.0, step / top)
    return _cosine(1.0, 1 / 250_000, (step - top) / (total - 1 - top))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """What `TrainingState.save` wrote, on the CPU. Raises PipelineError where it is missing or damaged."""
    path = folder / _STATE_FILE
    try:
        facts = json.loads((folder / _FACTS_FILE).read_text())
        whole = facts["format"] == FORMAT_VERSION and facts["sha256"] == _sha256(path)
    except (OSError, ValueError, KeyError) as error:
        raise PipelineError(f"{folder}: no readable checkpoint ({error}); remove it to go on without") from error
    if not whole:
        raise PipelineError(f"{folder}: damaged checkpoint, or one of another version; remove it to go on without")
    saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return saved


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
