"""What is tracked of the steps between two records."""

import time
from typing import Any, NamedTuple

from gmflow.metrics import ErrorMetrics


class StepTotals(NamedTuple):
    """One step over all ranks, whether its update was applied, and where its time went (seconds, this rank)."""

    loss: float
    metrics: ErrorMetrics
    grad_norm: float
    applied: bool
    data_wait: float


class Interval:
    """Sums over the steps since the last record. Part of a checkpoint, so that no step is missing from a curve.

    Skipped steps count for the time only: one figure that is not finite would be all that is seen of the others.
    """

    def __init__(self) -> None:
        self.steps = 0  # applied ones
        self.loss = 0.0
        self.grad_norm = 0.0
        self.scores = ErrorMetrics()
        # Of this attempt's steps only: what was timed elsewhere says nothing about this machine.
        self.timed_steps = 0
        self.data_wait = 0.0
        self.seconds = 0.0
        self._since = time.perf_counter()

    def add(self, totals: StepTotals) -> None:
        if totals.applied:
            self.steps += 1
            self.loss += totals.loss
            self.grad_norm += totals.grad_norm
            self.scores.merge(totals.metrics)
        self.timed_steps += 1
        self.data_wait += totals.data_wait
        self.seconds += time.perf_counter() - self._since
        self.restart_clock()

    def restart_clock(self) -> None:
        """Time from here on belongs to the next step."""
        self._since = time.perf_counter()

    def metrics(self, global_batch: int) -> dict[str, float]:
        """Means over the interval, as they are tracked; those of the training where a step was applied."""
        return {
            **(self._of_training() if self.steps else {}),
            "time/step_s": self.seconds / self.timed_steps,
            "time/samples_per_s": self.timed_steps * global_batch / self.seconds,
            "time/data_wait": self.data_wait / self.seconds,
        }

    def _of_training(self) -> dict[str, float]:
        scores = self.scores.compute()
        return {
            "train/loss": self.loss / self.steps,
            "train/grad_norm": self.grad_norm / self.steps,
            **{f"train/{name}": scores[name] for name in ("epe", "px1", "px3", "px5")},
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "scores": self.scores.state(),
        }

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> "Interval":
        interval = cls()
        interval.steps, interval.loss, interval.grad_norm = saved["steps"], saved["loss"], saved["grad_norm"]
        interval.scores = ErrorMetrics.from_state(saved["scores"])
        return interval
