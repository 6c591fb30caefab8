"""Reaching MLflow: its address, a client that has got an answer, an experiment, and requests that are not repeated."""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.tracking import MlflowClient

from pipelines.errors import OutageError, PipelineError
from pipelines.lasting import is_uploaded
from pipelines.training import mlflow_patience
from pipelines.training.config import shown_uri

_EXISTS = ErrorCode.Name(RESOURCE_ALREADY_EXISTS)
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_CREDENTIALS_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
_ASKING = threading.RLock()


def tracking_uri(configured: str | None) -> str:
    """The configured URI, else MLFLOW_TRACKING_URI, else SQLite in `runs/` of the working folder."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('runs/mlflow.db').absolute()}"


def place_of(client: MlflowClient) -> str:
    """Where a client's runs and models are, as text for people."""
    return shown_uri(str(client.tracking_uri))


def connect(configured: str | None, *, answered: bool = False) -> MlflowClient:
    """A client whose server has answered, now or (`answered`) before.

    Raises OutageError if a server does not answer, PipelineError if there can be none.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # no line for each table it creates
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # nor for each attempt to reach a server
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # nor a bar for each download
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # nor links among a command's results
    os.environ.setdefault(_RETRIES, "2")  # `Patience` waits, and says so
    uri = tracking_uri(configured)
    folder = _embedded_folder(uri)
    if folder is not None:
        if is_uploaded(folder.as_posix()):
            raise PipelineError(
                f"MLflow at {uri}: lies in the folder that this job was uploaded into, and would be lost with it; "
                + ("give mlflow.tracking_uri=null, and " if configured else "")
                + "set MLFLOW_TRACKING_URI to a server, or to sqlite:/// and an absolute path, for the cluster's nodes"
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
        if isinstance(error, MlflowException) and error.get_http_status_code() in _CREDENTIALS_REFUSED:
            raise PipelineError(
                f"MLflow at {shown_uri(uri)} refuses the credentials; check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from error
        text = f"MLflow at {shown_uri(uri)} does not answer: {shown_uri(str(error))}"
        raise (PipelineError(text) if folder is not None else mlflow_patience.as_error(error, text)) from error
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


def experiment_id(client: MlflowClient, name: str) -> str:
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
    if found is None:
        raise OutageError(f"{where} was there, and is no longer; give the same command again")
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
