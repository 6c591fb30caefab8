"""The sweep in MLflow: a parent run with a child for every probed setting and trial, comparable in MLflow's UI."""

import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag

from datasets_etl.manifest import Manifest
from pipelines.sweeping.accuracy import Weights
from pipelines.sweeping.config import SweepConfig
from pipelines.sweeping.table import Row
from pipelines.sweeping.trials import stage_identity
from pipelines.training import mlflow_client, tracking
from pipelines.training.config import StageConfig
from pipelines.training.feed import Record


class SweepRun:
    """The parent run and its children.

    A sweep that is continued finds its parent again: the parent's key does not contain how much is searched, how, and
    on which machines. A child's key identifies what determines its own metrics, so a continued sweep finds that too.

    Callable from any thread: both Tune's loop and the feed report on trials.

    Args:
        config, weights, manifests: those of the sweep.
        tell, held: see `ParentRun`.
        begun: tells this sweep from one of the same config on other storage, or whose folder was deleted: their curves
            are other runs'. Empty for one that an earlier version began.
    """

    def __init__(
        self,
        config: SweepConfig,
        weights: Weights | None,
        manifests: Mapping[str, Manifest],
        tell: Callable[[str], None],
        held: Callable[[], bool] = lambda: True,
        begun: str = "",
    ) -> None:
        self.client = mlflow_client.connect(config.mlflow.tracking_uri)
        content = json.dumps(_identity(config, weights, manifests) + [begun] * bool(begun), sort_keys=True)
        key = f"sweep/{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        self._prefix = f"sweep/{config.name}/{begun}/" if begun else f"sweep/{config.name}/"
        self.parent = tracking.ParentRun(self.client, config.mlflow, config.name, key, tell, held)
        self.run_id = self.parent.run_id
        self._patience = self.parent.patience
        self._lock = threading.RLock()
        self._children: dict[str, tracking.TrackedRun] = {}
        self._patience(self.client.log_dict, self.run_id, config.model_dump(mode="json"), "config.yaml")
        tags = {f"manifest.{name}": manifest.url for name, manifest in manifests.items()}
        if weights is not None:
            tags["weights"] = weights.source
        self._tag(self.run_id, tags)

    def child(self, row: Row) -> tracking.TrackedRun:
        """The run of a setting or trial."""
        label = f"{row.phase}/{row.name}"
        with self._lock:
            if label not in self._children:
                run = self.parent.child(row.name, key=f"{self._prefix}{row.phase}/{row.key}")
                params = [Param(name, str(value)) for name, value in {"phase": row.phase, **row.point}.items()]
                self._patience(self.client.log_batch, run.run_id, params=params)
                self._patience(self.client.update_run, run.run_id, status="RUNNING")
                self._children[label] = run
            return self._children[label]

    def describe(self, row: Row, stage: StageConfig) -> None:
        """Log the complete config of a trial's stage."""
        self.child(row).log_json(stage.model_dump(mode="json"), "stage.json")

    def log(self, row: Row, record: Record) -> None:
        """Log a row's metrics, those of each step once."""
        with self._lock:
            self.child(row).log(record)

    def end(self, row: Row) -> None:
        """Log how a row ended and why, and for a probed setting its metrics."""
        if row.phase == "probe":
            self.log(row, Record(0, row.metrics))
        run_id = self.child(row).run_id
        self._tag(run_id, {"sweep.status": row.status, "sweep.reason": row.reason})
        self._patience(self.client.set_terminated, run_id, "FAILED" if row.status == "failed" else "FINISHED")

    def judge(self, row: Row) -> None:
        """Log what is known only after all rows: cost, and whether the row is on the front or the reference."""
        run_id = self.child(row).run_id
        now = int(time.time() * 1000)  # a repeated sweep logs them again; MLflow shows the newest
        metrics = [Metric(name, value, now, 0) for name, value in vars(row.cost).items()] if row.cost else []
        self._patience(self.client.log_batch, run_id, metrics=metrics)
        marks = {"sweep.front": row.front, "sweep.reference": row.reference}
        self._tag(run_id, {name: str(holds).lower() for name, holds in marks.items()})

    def keep(self, files: Mapping[str, bytes]) -> None:
        """Log the report's files as artifacts of the parent."""
        with tempfile.TemporaryDirectory(prefix="gmflow-report-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self._patience(self.client.log_artifacts, self.run_id, folder, "report")

    def _tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        entries = [RunTag(name, value) for name, value in tags.items()]
        self._patience(self.client.log_batch, run_id, tags=entries)


def _identity(config: SweepConfig, weights: Weights | None, manifests: Mapping[str, Manifest]) -> list[Any]:
    """What must not change if a sweep is to remain the same: what determines the metrics of any setting or trial."""
    probe, tuned = config.probe, config.tune
    return [
        config.name,
        config.architecture.to_dict(),
        None if weights is None else weights.version,
        config.seed,
        config.precision,
        {name: manifest.version for name, manifest in manifests.items()},
        None if probe is None else [chosen.model_dump(mode="json") for chosen in probe.validation],
        None if tuned is None else [tuned.start, *stage_identity(tuned.stage)],
    ]
