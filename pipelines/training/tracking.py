"""MLflow runs of a curriculum: a parent run with a child for each stage; repeating the command finds them again."""

import contextlib
import importlib.metadata
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from datasets_etl.manifest import Manifest
from pipelines.cluster import nodes
from pipelines.training.code_version import code_version
from pipelines.training.config import CurriculumConfig, MlflowConfig
from pipelines.training.feed import Record
from pipelines.training.mlflow_client import asked_once, experiment_id
from pipelines.training.mlflow_patience import Patience, RefusedError

# Tag that identifies what a run belongs to, so that a second attempt finds the run.
KEY_TAG = "gmflow.key"

STAGE_RUN_TAG = "stage_run."
"""Prefix of a tag of a curriculum's run; a stage's name follows. Its value is the id of the stage's run."""

PARENT_TAG = "mlflow.parentRunId"

_Result = TypeVar("_Result")

_MOMENT_S = 10.0


class TrackedRun:
    """A run that logs records, and ensures that no metric is logged twice for a step."""

    def __init__(self, client: MlflowClient, run: Run, patience: Patience, held: Callable[[], bool]) -> None:
        self.client = client
        self.run_id: str = run.info.run_id
        self._patience = patience
        self._held = held
        self._logged: dict[str, int] | None = None  # metric → newest step MLflow has; None: not asked yet

    def log(self, record: Record) -> None:
        """Log metrics against the step. Those an earlier attempt already logged are left out: a replay is exact.

        Waits for MLflow if it is unreachable. If MLflow refuses a picture, this is reported and the picture dropped.
        Nothing is logged if another driver has taken the work over: it logs the same, and its steps would go back.
        """
        if not self._held():
            return
        for step, metrics in (*record.earlier, (record.step, record.metrics)):
            self._patience(self._log_metrics, step, metrics, record.time_ms)
        for name, png in record.pictures.items():
            try:
                self._patience(self._log_picture, name, png)
            except RefusedError as error:
                self._patience.tell(f"{name} is not kept: {error}")

    def _log_metrics(self, step: int, metrics: Mapping[str, float], time_ms: int) -> None:
        if self._logged is None:
            self._logged = self._ask_what_was_logged()
        logged = self._logged
        news = {name: value for name, value in metrics.items() if step > logged.get(name, -1)}
        if not news or not self._held():  # asked at every attempt: what waited may have been taken over meanwhile
            return
        entries = [Metric(name, value, time_ms, step) for name, value in news.items()]
        try:
            self.client.log_batch(self.run_id, entries)
        except Exception:
            self._logged = None  # it may have arrived: ask before a retry
            raise
        logged |= dict.fromkeys(news, step)

    def _log_picture(self, name: str, png: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(png)
            self.client.log_artifact(self.run_id, str(path), "pictures")

    def _ask_what_was_logged(self) -> dict[str, int]:
        known = self.client.get_run(self.run_id).data.metrics
        return {name: max(entry.step for entry in self.client.get_metric_history(self.run_id, name)) for name in known}

    def log_json(self, content: Mapping[str, Any], name: str) -> None:
        self._patience(self.client.log_dict, self.run_id, dict(content), name)


class ParentRun:
    """The run of a whole curriculum or sweep; the runs of its stages, or settings and trials, are its children.

    Args:
        client: a client from `connect`.
        config: names the experiment, and how long to wait for MLflow.
        name: name of the curriculum or sweep.
        key: identifies what the run belongs to; the same key finds the same run.
        tell: called with a line when waiting for MLflow begins.
        held: whether this driver still has the claim on the work, see `claimed`.
    """

    def __init__(
        self,
        client: MlflowClient,
        config: MlflowConfig,
        name: str,
        key: str,
        tell: Callable[[str], None],
        held: Callable[[], bool] = lambda: True,
    ) -> None:
        self.client = client
        self.held = held
        self.patience = Patience(config.patience_s, tell)
        self.experiment_id = self.patience(experiment_id, client, config.experiment)
        own = self.patience(_find_or_create, client, self.experiment_id, name, key, {})
        self.own = TrackedRun(client, own, self.patience, held)
        self.run_id = self.own.run_id

    def child(self, name: str, key: str) -> TrackedRun:
        """The run of a stage, setting or trial. If its key finds a run of another parent, the run moves to this parent,
        and the other parent is marked as killed if MLflow still has it as running.
        """
        tags = {PARENT_TAG: self.run_id, "stage": name}
        run = self.patience(_find_or_create, self.client, self.experiment_id, name, key, tags)
        before = run.data.tags.get(PARENT_TAG)
        if before != self.run_id:
            self.patience(self.client.set_tag, run.info.run_id, PARENT_TAG, self.run_id)
            if before is not None and self.patience(self.client.get_run, before).info.status == "RUNNING":
                self.patience(self.client.set_terminated, before, "KILLED")
        return TrackedRun(self.client, run, self.patience, self.held)

    def holds(self, run_id: str) -> bool:
        """Whether this MLflow has a run. Another MLflow has neither the curves nor the models of that training."""
        try:
            self.patience(self.client.get_run, run_id)
        except MlflowException:  # NOT_FOUND: the only error that is not a refusal
            return False
        return True

    def running(self, run_id: str) -> contextlib.AbstractContextManager[None]:
        """`run_status` for this run or one of its children; waits if the server is unreachable."""
        return run_status(self.client, run_id, self.patience, self.held)


class CurriculumRun(ParentRun):
    """The run of a curriculum."""

    def name_stage(self, name: str, run_id: str) -> None:
        """Store which run has a stage's curves: that of a stage finished earlier is a child of another parent."""
        self.patience(self.client.set_tag, self.run_id, f"{STAGE_RUN_TAG}{name}", run_id)

    def log_setup(self, config: CurriculumConfig, manifests: Mapping[str, Manifest]) -> None:
        """Log the resolved config, the manifests that the run reads, and what it runs on."""
        self.own.log_json(config.model_dump(mode="json"), "config.yaml")
        self.own.log_json({**environment(), "cluster": machines()}, "environment.json")
        facts = {
            name: {"url": manifest.url, "version": manifest.version, "subsets": manifest.subsets}
            for name, manifest in manifests.items()
        }
        self.own.log_json(facts, "manifests.json")
        for name, manifest in manifests.items():
            self.patience(self.client.set_tag, self.run_id, f"manifest.{name}", manifest.url)

    def log_stage(self, number: int, metrics: Mapping[str, float]) -> None:
        """Log the validation metrics of a finished stage, with the stage's number as the step."""
        self.own.log(Record(number, {name: value for name, value in metrics.items() if name.startswith("val/")}))


def start_run(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> Run:
    """A new run of an experiment, which is created if there is none with that name."""
    return client.create_run(experiment_id(client, experiment), run_name=name, tags=dict(tags))


def _find_or_create(client: MlflowClient, experiment_id: str, name: str, key: str, tags: dict[str, str]) -> Run:
    found = client.search_runs([experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    if found:
        return found[0]
    with asked_once():
        return client.create_run(experiment_id, run_name=name, tags={KEY_TAG: key, **tags})


def environment() -> dict[str, Any]:
    """Versions and machine, so that the environments of runs can be compared."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "code": code_version(),
        "packages": {found.name: found.version for found in importlib.metadata.distributions()},
    }


def machines() -> list[dict[str, float]]:
    """Resources of each machine of the connected cluster: the driver's own machine may have no GPU."""
    return [{name: n for name, n in found.items() if not name.startswith("node:")} for found in nodes()]


@contextlib.contextmanager
def run_status(
    client: MlflowClient, run_id: str, patience: Patience | None = None, held: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Mark a run as running, then as finished, as killed (interrupted), or as failed (any other error).

    After an error it is not waited for long, and not marked if another driver has taken it over (not `held`).
    """
    call = patience or _at_once
    call(client.update_run, run_id, status="RUNNING")
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"

        def mark() -> None:
            if held():
                client.set_terminated(run_id, status)

        _for_a_moment(mark)
        raise
    call(client.set_terminated, run_id, "FINISHED")


def _for_a_moment(work: Callable[[], object]) -> None:
    """Try it, for `_MOMENT_S` at most and without its errors: what ends the program now says more."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            work()

    trying = threading.Thread(target=attempt, name="last-words", daemon=True)
    trying.start()
    trying.join(_MOMENT_S)


def _at_once(work: Callable[..., _Result], *arguments: Any, **named: Any) -> _Result:
    return work(*arguments, **named)
