"""Names for versions of a registered model that move from one to the next, and can be moved back."""

import json
from http import HTTPStatus

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipelines.errors import PipelineError
from pipelines.training.mlflow_client import place_of
from pipelines.training.model_versions import known_models

CHAMPION = "champion"

_REMEMBERED = 100  # how many versions an alias can be rolled back


def move_alias(client: MlflowClient, model_name: str, alias: str, version: str) -> str | None:
    """Point an alias to a version, and keep the one before in the model's tags. Returns that; None for a new alias."""
    before = _alias(client, model_name, alias)
    if before == str(version):
        return before
    earlier = earlier_versions(client, model_name, alias)
    if before is not None and earlier[-1:] != [before]:  # otherwise an attempt that was then killed has stored it
        _remember(client, model_name, alias, [*earlier, before])
    client.set_registered_model_alias(model_name, alias, version)
    return before


def roll_back(client: MlflowClient, model_name: str, alias: str) -> tuple[str, str]:
    """Point an alias to its previous version; a second call goes to the one before that. Returns (old, new) version.

    Raises PipelineError if there is no such alias, or no earlier version.
    """
    before = _alias(client, model_name, alias)
    if before is None:
        raise PipelineError(
            f"models:/{model_name}@{alias}: no such model at {place_of(client)}; there is: {known_models(client)}"
        )
    versions = earlier_versions(client, model_name, alias)
    # The same one is left by a rollback that was killed halfway.
    while versions and (versions[-1] == before or not _exists(client, model_name, versions[-1])):
        versions.pop()
    if not versions:
        raise PipelineError(f"models:/{model_name}@{alias}: no earlier version is left; it is on {before}")
    *earlier, wanted = versions
    client.set_registered_model_alias(model_name, alias, wanted)
    _remember(client, model_name, alias, earlier)
    return before, wanted


def _exists(client: MlflowClient, model_name: str, version: str) -> bool:
    """Whether a version was not deleted. Raises MLflow's error if it does not say so."""
    try:
        client.get_model_version(model_name, version)
    except MlflowException as error:
        if error.get_http_status_code() != HTTPStatus.NOT_FOUND:
            raise
        return False
    return True


def _alias(client: MlflowClient, model_name: str, alias: str) -> str | None:
    found = version_by_alias(client, model_name, alias)
    return None if found is None else str(found.version)


def version_by_alias(client: MlflowClient, model_name: str, alias: str) -> ModelVersion | None:
    """None if there is no such alias or model. Raises MLflow's error if it does not say so: it is away, or refuses."""
    try:
        return client.get_model_version_by_alias(model_name, alias)
    except MlflowException as error:
        if error.get_http_status_code() not in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND):
            raise
        return None


def earlier_versions(client: MlflowClient, model_name: str, alias: str) -> list[str]:
    """Versions that an alias pointed to before, the most recent one last."""
    tags = client.get_registered_model(model_name).tags
    found: list[str] = json.loads(tags.get(f"earlier.{alias}", "[]"))
    return found


def _remember(client: MlflowClient, model_name: str, alias: str, versions: list[str]) -> None:
    client.set_registered_model_tag(model_name, f"earlier.{alias}", json.dumps(versions[-_REMEMBERED:]))
