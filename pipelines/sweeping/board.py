"""The trials of a sweep as a person follows them: rows of the table, and runs of MLflow."""

import threading
from dataclasses import replace

from pipelines.sweeping.table import Row
from pipelines.sweeping.tracking import SweepRun
from pipelines.sweeping.trial_driver import TrialRecord
from pipelines.sweeping.trials import Trial, TrialResult
from pipelines.sweeping.view import SweepView
from pipelines.training.feed import Record


class TrialBoard:
    """A `Listener` of `tune_trials`. Tune's thread and the feed's threads call it.

    Attributes:
        rows: trial name → its row as of now.
    """

    def __init__(self, view: SweepView, run: SweepRun) -> None:
        self.view = view
        self.run = run
        self.rows: dict[str, Row] = {}
        self._lock = threading.Lock()

    def started(self, trial: Trial) -> None:
        with self._lock:
            choices = {name: trial.point[name] for name in trial.point if not name.startswith(("attn", "corr", "prop"))}
            row = Row(trial.name, "trial", trial.key, trial.model.build(), status="running", choices=choices)
            self._update(row)
            self.run.describe(row, trial.stage)

    def validated(self, trial: Trial, step: int, metrics: dict[str, float]) -> None:
        with self._lock:
            row = self.rows[trial.name]
            self._update(replace(row, step=max(row.step, step), metrics=metrics))
            self.run.log(row, Record(step, metrics))

    def ended(self, trial: Trial, result: TrialResult) -> None:
        if trial.name not in self.rows:  # its driver was lost while it started
            self.started(trial)
        with self._lock:
            row = self.rows[trial.name]
            step = max(row.step, result.step)
            self._update(replace(row, status=result.status, reason=result.reason, step=step))
            self.run.end(self.rows[trial.name])

    def show(self, record: Record) -> None:
        with self._lock:
            row = self.rows.get(_trial_of(record))
            if row is not None and row.status == "running":
                self._update(replace(row, step=max(row.step, record.step)))
        if record.line:
            self.view.log(f"{_trial_of(record)}: {record.line}")

    def keep(self, record: Record) -> None:
        """Log training metrics and pictures; validations come from Tune's loop, so all agree on where a trial ended.

        Records of a stopped trial are dropped, because its workers go on for a moment.
        """
        row = self.rows.get(_trial_of(record))
        if row is not None and row.status != "stopped":
            metrics = {name: value for name, value in record.metrics.items() if not name.startswith("val/")}
            self.run.log(row, replace(record, metrics=metrics))

    def _update(self, row: Row) -> None:
        self.rows[row.name] = row
        self.view.show(row)


def _trial_of(record: Record) -> str:
    return record.trial if isinstance(record, TrialRecord) else ""
