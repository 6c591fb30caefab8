"""MLflow runs of a curriculum: a parent run with a child for each stage; repeating the command finds them again."""

import contextlib
import importlib.metadata
import logging
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import mlflow
import requests
import tenacity
import torch
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.entities import LifecycleStage, Metric, Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.tracking import MlflowClient

from datasets_etl import storage
from datasets_etl.manifest import Manifest
from pipelines.cluster import nodes
from pipelines.entry import first_line
from pipelines.errors import PipelineError
from pipelines.lasting import is_uploaded
from pipelines.training.code_version import code_version
from pipelines.training.config import CurriculumConfig, MlflowConfig, shown_uri
from pipelines.training.feed import Record

# Tag that identifies what a run belongs to, so that a second attempt finds the run.
KEY_TAG = "gmflow.key"

STAGE_RUN_TAG = "stage_run."
"""Prefix of a tag of a curriculum's run; a stage's name follows. Its value is the id of the stage's run."""

PARENT_TAG = "mlflow.parentRunId"

_Result = TypeVar("_Result")

_MOMENT_S = 10.0
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_ASKING = threading.RLock()


def tracking_uri(configured: str | None) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else SQLite in `runs/` of the working folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').absolute()}"


def place_of(client: MlflowClient) -> str:
    """Where a client's runs and models are, as text for people."""
    return shown_uri(str(client.tracking_uri))


def connect(configured: str | None, *, answered: bool = False) -> MlflowClient:
    """A client whose server has answered, now or (`answered`) before. Raises PipelineError if it does not answer."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # no line for each table it creates
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # nor for each attempt to reach a server
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # nor a bar for each download
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # nor links among a command's results
    os.environ.setdefault(_RETRIES, "2")  # `Patience` waits, and says so
    uri = tracking_uri(configured)
    if (folder := _embedded_folder(uri)) is not None:
        if is_uploaded(folder.as_posix()):
            raise PipelineError(
                f"MLflow at {uri}: lies in the folder that this job was uploaded into, and would be lost with it; set "
                "MLFLOW_TRACKING_URI to a server, or to sqlite:/// and an absolute path, for the cluster's nodes"
            )
        folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = MlflowClient(uri)
    if answered:
        return client
    try:
        client.search_experiments(max_results=1)  # on the first call this creates the tables of an embedded database
    except Exception as error:  # MLflow raises whatever its transport does
        raise PipelineError(f"MLflow at {shown_uri(uri)} does not answer: {shown_uri(str(error))}") from error
    return client


def connect_existing(configured: str | None) -> MlflowClient:
    """`connect` for read-only use: otherwise a missing database would be created, and it would be empty."""
    uri = tracking_uri(configured)
    if _embedded_folder(uri) is not None and not Path(uri.removeprefix("sqlite:///")).exists():
        raise PipelineError(
            f"MLflow at {uri}: no such database; it is made by the first run that is tracked. Set MLFLOW_TRACKING_URI "
            "to where that was"
        )
    return connect(configured)


def _embedded_folder(uri: str) -> Path | None:
    """The folder of an embedded SQLite database; None for any other URI."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).absolute().parent


class RefusedError(PipelineError):
    """MLflow or its artifact storage refuses a request; waiting would not help."""


class Patience:
    """Calls a function, and retries it while MLflow is unreachable or busy.

    Args:
        patience_s: for how long to retry, in seconds.
        tell: called with a line when waiting begins, and when it is over.
    """

    def __init__(self, patience_s: float, tell: Callable[[str], None]) -> None:
        self._patience_s, self.tell = patience_s, tell

    def __call__(self, work: Callable[..., _Result], *arguments: Any, **named: Any) -> _Result:
        """Raises PipelineError if retries took longer than the patience. Raises at once: RefusedError if waiting would
        not help, and MLflow's own error if it says that something does not exist.
        """
        trying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            stop=tenacity.stop_after_delay(self._patience_s),
            wait=tenacity.wait_exponential_jitter(multiplier=0.5, max=15.0),
            before_sleep=self._say_once,
            reraise=True,
        )
        try:
            result = trying(work, *arguments, **named)
        except Exception as error:
            if not may_pass(error) and _refuses(error):
                raise RefusedError(
                    f"MLflow's server or its storage of artifacts refuses: {first_line(error)}; once that is mended, "
                    "the same command goes on"
                ) from error
            if not may_pass(error):
                raise
            raise PipelineError(
                f"MLflow was away for longer than mlflow.patience_s {self._patience_s:g} ({first_line(error)}); what "
                "was trained is kept, the same command goes on once it answers"
            ) from error
        if trying.statistics["attempt_number"] > 1:
            self.tell("MLflow answers again")
        return result

    def _say_once(self, state: tenacity.RetryCallState) -> None:
        error = None if state.outcome is None else state.outcome.exception()
        if state.attempt_number == 1 and error is not None:
            self.tell(f"MLflow is away ({first_line(error)}); what it should know is kept and sent when it answers")


def _refuses(error: BaseException) -> bool:
    """Whether an error is a refusal by MLflow or its storage. "Does not exist" is an answer, not a refusal."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code() != HTTPStatus.NOT_FOUND
    return isinstance(error, TRANSPORT_ERRORS)


def may_pass(error: BaseException) -> bool:
    """Whether an error means that MLflow or its storage is unreachable or busy, rather than that it refuses."""
    if isinstance(error, MlflowException):
        return _is_busy(error.get_http_status_code())
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return _is_busy(error.response.status_code)
    return isinstance(error, requests.RequestException) or storage.may_pass(error)


def _is_busy(status: int) -> bool:
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _LATER


TRANSPORT_ERRORS = (requests.RequestException, BotoCoreError, ClientError, Boto3Error)
_EXISTS = ErrorCode.Name(RESOURCE_ALREADY_EXISTS)
_LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)


class TrackedRun:
    """A run that logs records, and ensures that no metric is logged twice for a step."""

    def __init__(self, client: MlflowClient, run: Run, patience: Patience, held: Callable[[], bool]) -> None:
        self.client = client
        self.run_id: str = run.info.run_id
        self._patience = patience
        self._held = held
        self._told: dict[str, int] | None = None  # metric → newest step MLflow has; None: not asked yet

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
        if self._told is None:
            self._told = self._ask_what_was_told()
        told = self._told
        news = {name: value for name, value in metrics.items() if step > told.get(name, -1)}
        if not news:
            return
        entries = [Metric(name, value, time_ms, step) for name, value in news.items()]
        try:
            self.client.log_batch(self.run_id, entries)
        except Exception:
            self._told = None  # it may have arrived: ask before a retry
            raise
        told |= dict.fromkeys(news, step)

    def _log_picture(self, name: str, png: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(png)
            self.client.log_artifact(self.run_id, str(path), "pictures")

    def _ask_what_was_told(self) -> dict[str, int]:
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
        self.experiment_id = self.patience(_experiment, client, config.experiment)
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


def run_link(uri: str, experiment: str, run_id: str) -> str:
    """Where to look at a run: its page if MLflow is a server, else its id."""
    if not uri.startswith(("http://", "https://")):
        return f"run {run_id}"
    try:
        found = MlflowClient(uri).get_experiment_by_name(experiment)
    except MlflowException:  # all is done; only the address is unknown
        found = None
    if found is None:
        return f"run {run_id}"
    return f"{shown_uri(uri).rstrip('/')}/#/experiments/{found.experiment_id}/runs/{run_id}"


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
        _for_a_moment(lambda: held() and client.set_terminated(run_id, status))
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


def start_run(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> Run:
    """A new run of an experiment, which is created if there is none with that name."""
    return client.create_run(_experiment(client, experiment), run_name=name, tags=dict(tags))


def _experiment(client: MlflowClient, name: str) -> str:
    """The id of an experiment by name, created if it does not exist. Raises PipelineError if it cannot be used."""
    found = client.get_experiment_by_name(name)
    if found is None:
        place = _place_of_artifacts(str(client.tracking_uri))
        try:
            with asked_once():
                return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != _EXISTS:
                raise
        # Another job was faster, or the answer to an earlier request of ours was lost.
        found = client.get_experiment_by_name(name)
    where = f"MLflow at {place_of(client)}: experiment {name!r}"
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise PipelineError(
            f"{where} was deleted: restore it (mlflow experiments restore --experiment-id {found.experiment_id}), or "
            "give another one"
        )
    if is_uploaded(str(found.artifact_location)):
        raise PipelineError(
            f"{where} keeps its files in {found.artifact_location}, where a job was uploaded, and would lose them with "
            "it; give another one"
        )
    return str(found.experiment_id)


def _place_of_artifacts(uri: str) -> str | None:
    """Where a new experiment's files go; None if the server decides. Raises PipelineError for a database alone."""
    if (folder := _embedded_folder(uri)) is not None:
        return (folder / "mlflow-artifacts").as_uri()
    if urlsplit(uri).scheme.partition("+")[0] in DATABASE_ENGINES:
        raise PipelineError(
            f"MLflow at {shown_uri(uri)}: a database without a server has no place for models; set MLFLOW_TRACKING_URI "
            "to the server's http:// address, or make the experiment first: mlflow experiments create -n NAME -l "
            "s3://BUCKET/PREFIX"
        )
    return None


def _find_or_create(client: MlflowClient, experiment_id: str, name: str, key: str, tags: dict[str, str]) -> Run:
    found = client.search_runs([experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    if found:
        return found[0]
    with asked_once():
        return client.create_run(experiment_id, run_name=name, tags={KEY_TAG: key, **tags})


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Within the block, MLflow's client sends no request again whose answer was lost, so that nothing is made twice.

    `Patience` repeats what looks first whether it is there already.
    """
    with _ASKING, in_environment(_RETRIES, "0"):
        yield


@contextlib.contextmanager
def in_environment(name: str, value: str) -> Iterator[None]:
    """Within the block a variable has this value: some settings of MLflow are nothing but variables."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
