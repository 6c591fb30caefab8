"""MLflow runs of a curriculum: one parent, one child a stage, found again when the same command is given again."""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from datasets_etl.manifest import Manifest
from pipelines.errors import PipelineError
from pipelines.training.config import CurriculumConfig, MlflowConfig
from pipelines.training.feed import Record

# Identifies what a run is of, so that a second attempt finds it.
KEY_TAG = "gmflow.key"


def tracking_uri(configured: str | None) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else SQLite in `runs/` of the working folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').absolute()}"


def connect(configured: str | None) -> MlflowClient:
    """A client whose server answered. Raises PipelineError where there is none."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # not every table it makes is news
    uri = tracking_uri(configured)
    if (folder := _embedded_folder(uri)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = MlflowClient(uri)
    try:
        client.search_experiments(max_results=1)  # creates an embedded database's tables, once
    except Exception as error:  # MLflow raises whatever its transport does
        raise PipelineError(f"MLflow at {uri} does not answer: {error}") from error
    return client


def _embedded_folder(uri: str) -> Path | None:
    """Where an embedded SQLite database lies; None for a server."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).absolute().parent


class TrackedRun:
    """A run that takes records and sees that none is told twice."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.client = client
        self.run_id: str = run.info.run_id
        self._told: dict[str, int] = {}  # metric → newest step MLflow has

    def log(self, record: Record) -> None:
        """Metrics against the step; what an earlier attempt already told is left out: a replay is exact."""
        news = {name: value for name, value in record.metrics.items() if record.step > self._last_told(name)}
        if news:
            now = int(time.time() * 1000)
            self.client.log_batch(self.run_id, [Metric(name, value, now, record.step) for name, value in news.items()])
            self._told |= dict.fromkeys(news, record.step)
        for name, png in record.pictures.items():
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / name
                path.write_bytes(png)
                self.client.log_artifact(self.run_id, str(path), "pictures")

    def _last_told(self, name: str) -> int:
        if name not in self._told:
            history = self.client.get_metric_history(self.run_id, name)
            self._told[name] = max((metric.step for metric in history), default=-1)
        return self._told[name]

    def log_json(self, content: Mapping[str, Any], name: str) -> None:
        self.client.log_dict(self.run_id, dict(content), name)


class CurriculumRun:
    """The parent run.

    Args:
        client: of `connect`.
        config: experiment and names.
        name: of the curriculum.
        key: names the resolved config; the same key finds the same run.
    """

    def __init__(self, client: MlflowClient, config: MlflowConfig, name: str, key: str) -> None:
        self.client = client
        self.experiment_id = _experiment(client, config.experiment)
        self._own = TrackedRun(client, _find_or_create(client, self.experiment_id, name, key, {}))
        self.run_id = self._own.run_id

    def stage(self, name: str, key: str) -> TrackedRun:
        """The child run of a stage."""
        tags = {"mlflow.parentRunId": self.run_id, "stage": name}
        run = _find_or_create(self.client, self.experiment_id, name, key, tags)
        return TrackedRun(self.client, run)

    def log_setup(self, config: CurriculumConfig, manifests: Mapping[str, Manifest]) -> None:
        """The resolved config and the manifests the run reads."""
        resolved = config.model_dump(mode="json")
        self.client.log_dict(self.run_id, resolved, "config.yaml")
        facts = {
            name: {"url": manifest.url, "version": manifest.version, "subsets": manifest.subsets}
            for name, manifest in manifests.items()
        }
        self.client.log_dict(self.run_id, facts, "manifests.json")
        for name, manifest in manifests.items():
            self.client.set_tag(self.run_id, f"manifest.{name}", manifest.url)

    def log_stage(self, number: int, metrics: Mapping[str, float]) -> None:
        """A finished stage's validation, against the number of the stage."""
        self._own.log(Record(number, {name: value for name, value in metrics.items() if name.startswith("val/")}))

    @contextlib.contextmanager
    def running(self, run_id: str) -> Iterator[None]:
        """Marks a run as running, then as finished, or failed where the block raises."""
        with run_status(self.client, run_id):
            yield


@contextlib.contextmanager
def run_status(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Marks a run as running, then as finished, or failed where the block raises."""
    client.update_run(run_id, status="RUNNING")
    try:
        yield
    except BaseException:
        with contextlib.suppress(MlflowException):
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def start_run(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> Run:
    """A new run of an experiment, which is created where there is none of that name."""
    return client.create_run(_experiment(client, experiment), run_name=name, tags=dict(tags))


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    folder = _embedded_folder(str(client.tracking_uri))
    artifacts = None if folder is None else (folder / "mlflow-artifacts").as_uri()  # a server knows its own place
    return str(client.create_experiment(name, artifact_location=artifacts))


def _find_or_create(client: MlflowClient, experiment_id: str, name: str, key: str, tags: dict[str, str]) -> Run:
    found = client.search_runs([experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    if found:
        return found[0]
    return client.create_run(experiment_id, run_name=name, tags={KEY_TAG: key, **tags})
