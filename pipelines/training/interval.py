"""The metrics of the steps between two records."""

import time
from typing import Any, NamedTuple

from gmflow.metrics import ErrorMetrics


class StepTotals(NamedTuple):
    """One step over all ranks, whether its update was applied, and how long it waited for data (seconds)."""

    loss: float
    metrics: ErrorMetrics
    grad_norm: float
    applied: bool
    data_wait: float


class Interval:
    """Sums over the steps since the last record. They are part of a checkpoint, so no step is missing from a curve.

    Skipped steps count for the times only: a single NaN would make the interval's mean NaN.
    """

    def __init__(self) -> None:
        self.steps = 0  # only those that were applied
        self.loss = 0.0
        self.grad_norm = 0.0
        self.scores = ErrorMetrics()
        # Steps of this attempt only, without its first, in which the loaders start: the others do not show its speed.
        self.timed_steps = 0
        self.data_wait = 0.0
        self.seconds = 0.0
        self._since: float | None = None

    def add(self, totals: StepTotals) -> None:
        """Count a step that has just ended."""
        if totals.applied:
            self.steps += 1
            self.loss += totals.loss
            self.grad_norm += totals.grad_norm
            self.scores.merge(totals.metrics)
        now = time.perf_counter()
        if self._since is not None:
            self.timed_steps += 1
            self.data_wait += totals.data_wait
            self.seconds += now - self._since
        self._since = now

    def following(self) -> "Interval":
        """An empty interval, whose first step begins where the last step of this one ended."""
        interval = Interval()
        interval._since = self._since
        return interval

    def restart_clock(self) -> None:
        """Let the next step begin now: time spent before it, such as on a validation, belongs to no step."""
        if self._since is not None:
            self._since = time.perf_counter()

    def metrics(self, global_batch: int) -> dict[str, float]:
        """Means over the interval, by tracked name: training metrics if any step was applied, times if any step was
        timed.
        """
        return (self._of_training() if self.steps else {}) | (self._of_time(global_batch) if self.timed_steps else {})

    def _of_time(self, global_batch: int) -> dict[str, float]:
        return {
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
        """What a resume needs: all but times, which are of this attempt."""
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
