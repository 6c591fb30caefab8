"""Versions of registered models: found by reference, listed, downloaded."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.entry import first_line
from pipelines.errors import OutageError, PipelineError
from pipelines.training import mlflow_client, mlflow_patience
from pipelines.training.mlflow_client import place_of


def numbered(version: ModelVersion) -> str:
    """A version's reference by number."""
    return f"models:/{version.name}/{version.version}"


def look_up(reference: str, tracking_uri: str | None) -> tuple[MlflowClient, ModelVersion]:
    """A client of the registry, and the version that a reference stands for. Raises PipelineError if there is none.

    Args:
        reference: models:/NAME@ALIAS or models:/NAME/VERSION.
        tracking_uri: URI of the registry; for None, see `mlflow_client.tracking_uri`.
    """
    try:
        client = mlflow_client.connect_existing(tracking_uri)
    except PipelineError as error:
        raise type(error)(f"{reference}: {error}") from error
    return client, find_version(client, reference)


def find_version(client: MlflowClient, reference: str) -> ModelVersion:
    """The version of `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises PipelineError if there is none."""
    name, _, alias = reference.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    if not reference.startswith("models:/") or not name or not (alias or number):
        raise PipelineError(f"{reference}: no registered model; write models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        if mlflow_patience.may_pass(error):
            raise OutageError(f"{reference}: {place_of(client)} does not answer: {error.message}") from error
        known = known_models(client)
        raise PipelineError(f"{reference}: no such model at {place_of(client)}; there is: {known}") from error


def version_weights(client: MlflowClient, version: ModelVersion) -> bytes:
    """Content of the `.safetensors` of a version. Raises PipelineError if it has none."""
    with tempfile.TemporaryDirectory(prefix="gmflow-model-") as folder:
        return download(client, version, Path(folder)).read_bytes()


def download(client: MlflowClient, version: ModelVersion, folder: Path) -> Path:
    """Download a version; returns the path of its `.safetensors`. Raises PipelineError if it has none."""
    uri = numbered(version)
    try:
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except mlflow_patience.MLFLOW_ERRORS as error:
        text = f"{uri}: its files cannot be had from {place_of(client)}: {first_line(error)}"
        raise mlflow_patience.as_error(error, text) from error
    found = sorted(local.rglob("*.safetensors"))
    if not found:
        raise PipelineError(
            f"{uri}: no safetensors in it: its files were deleted, or something else than this pipeline registered it"
        )
    return found[0]


def registered_models(client: MlflowClient) -> Iterator[RegisteredModel]:
    """All of them; MLflow answers with a hundred at a time."""
    token = None
    while True:
        page = client.search_registered_models(page_token=token)
        yield from page
        if not (token := page.token):
            return


def known_models(client: MlflowClient) -> str:
    """Every alias of every registered model, as text for people."""
    references = [
        f"models:/{model.name}@{alias}" for model in registered_models(client) for alias in sorted(model.aliases)
    ]
    return ", ".join(references) or "nothing is registered"


def versions_of(client: MlflowClient, name: str) -> Sequence[ModelVersion]:
    """Every version of a model, in no order."""
    quote = '"' if "'" in name else "'"  # others' models may be named in ways that ours are not
    return client.search_model_versions(f"name = {quote}{name}{quote}")
