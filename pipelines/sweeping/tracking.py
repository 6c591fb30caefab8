"""The sweep in MLflow: one parent run, a child for every probed setting and every trial, comparable in its UI."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric, Param, RunTag

from datasets_etl.manifest import Manifest
from pipelines.sweeping.accuracy import Weights
from pipelines.sweeping.config import SweepConfig
from pipelines.sweeping.table import Row
from pipelines.training import tracking
from pipelines.training.feed import Record

# What a run may change without being another sweep.
_NOT_IDENTITY = {"storage", "mlflow", "registration", "cost"}


class SweepRun:
    """The parent run and its children; the same config and weights find the same ones again."""

    def __init__(self, config: SweepConfig, weights: Weights | None, manifests: Mapping[str, Manifest]) -> None:
        self.client = tracking.connect(config.mlflow.tracking_uri)
        identity = config.model_dump(mode="json", exclude=_NOT_IDENTITY)
        versions = {name: manifest.version for name, manifest in manifests.items()}
        content = json.dumps([identity, versions, weights and weights.version], sort_keys=True)
        key = f"sweep/{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        self.parent = tracking.CurriculumRun(self.client, config.mlflow, config.name, key)
        self.run_id = self.parent.run_id
        self.client.log_dict(self.run_id, config.facts(), "config.yaml")
        for name, manifest in manifests.items():
            self.client.set_tag(self.run_id, f"manifest.{name}", manifest.url)
        if weights is not None:
            self.client.set_tag(self.run_id, "weights", f"{config.weights} ({weights.version})")
        self._children: dict[str, tracking.TrackedRun] = {}

    def child(self, row: Row) -> tracking.TrackedRun:
        """The run of a setting or trial."""
        label = f"{row.phase}/{row.name}"
        if label not in self._children:
            run = self.parent.stage(row.name, key=f"{self.run_id}/{label}")
            params = [Param(name, str(value)) for name, value in {"phase": row.phase, **row.point}.items()]
            self.client.log_batch(run.run_id, params=params)
            self.client.update_run(run.run_id, status="RUNNING")
            self._children[label] = run
        return self._children[label]

    def end(self, row: Row) -> None:
        """What a row has come to: its metrics, how it ended, and why."""
        run = self.child(row)
        if row.phase == "probe":
            run.log(Record(0, row.metrics))
        facts = {"status": row.status, "reason": row.reason}
        tags = [RunTag(f"sweep.{name}", value) for name, value in facts.items()]
        self.client.log_batch(run.run_id, tags=tags)
        self.client.set_terminated(run.run_id, "FAILED" if row.status == "failed" else "FINISHED")

    def judge(self, row: Row) -> None:
        """What only the whole tells: cost and front."""
        run = self.child(row)
        metrics = [] if row.cost is None else list(vars(row.cost).items())
        tags = {"sweep.front": row.front, "sweep.reference": row.reference}
        self.client.log_batch(
            run.run_id,
            metrics=[Metric(name, value, 0, 0) for name, value in metrics],
            tags=[RunTag(name, str(holds).lower()) for name, holds in tags.items()],
        )

    def keep(self, files: Mapping[str, bytes]) -> None:
        """The report, as artifacts of the parent."""
        with tempfile.TemporaryDirectory(prefix="gmflow-report-") as folder:
            for name, content in files.items():
                (Path(folder) / name).write_bytes(content)
            self.client.log_artifacts(self.run_id, folder, "report")
