"""Registered models with their lineage."""

import base64
import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from importlib.metadata import version as package_version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType

import gmflow
from datasets_etl.formats import encode_frame_png
from datasets_etl.objects import file_sha256
from pipelines.entry import first_line
from pipelines.errors import OutageError, PipelineError
from pipelines.training import mlflow_client, mlflow_patience
from pipelines.training.data_config import MetricConfig, SetConfig
from pipelines.training.mlflow_client import place_of

log = logging.getLogger(__name__)

CHAMPION = "champion"

_FIGURE = ".6g"  # how tags hold figures
MEASURED_TAG = "measured."
"""Prefix of a version's tag; a validation set's name follows. Its value says which pairs the metrics come from."""

_WEIGHTS_TAG = "weights_sha256"

_LOADED_WITH = "MLFLOW_PYFUNC_INFERENCE_CONFIG"

_REMEMBERED = 100  # how many versions an alias can be rolled back

# AnyType stands for an array, or the bytes of an image file, plain or in base64: MLflow has no type for "one of these".
_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "image0"), ColSpec(AnyType(), "image1")]),
    params=ParamSchema([ParamSpec("encoding", DataType.string, "array")]),
)


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from. All of it becomes tags of the version.

    Attributes:
        stage: name of the stage.
        parent: "models:/NAME/N" of the stage before, the reference it was initialised from, or "random".
        manifests: data name → URL of the manifest that the stage trained on.
        config_hash: identifies everything that determined the weights.
        code_version: version of this project's code.
        metrics: metrics of the last validation, such as "val/sintel/training-clean/epe".
        measured: which pairs they were measured on, from `measured_on`: metrics on other pairs are not comparable.
    """

    stage: str
    parent: str
    manifests: Mapping[str, str]
    config_hash: str
    code_version: str
    metrics: Mapping[str, float]
    measured: Mapping[str, str] = field(default_factory=dict)

    def tags(self) -> dict[str, str]:
        """As the version's tags; figures to six digits."""
        return {
            "stage": self.stage,
            "parent": self.parent,
            "manifests": json.dumps(dict(self.manifests), sort_keys=True),
            "config_hash": self.config_hash,
            "code_version": self.code_version,
            **{_figure_tag(name): f"{value:{_FIGURE}}" for name, value in self.metrics.items()},
            **{_measured_tag(name): pairs for name, pairs in self.measured.items()},
        }


def measured_on(sets: Sequence[SetConfig], versions: Mapping[str, str]) -> dict[str, str]:
    """Name of a validation set → version of its manifest, and which part of it was used if that was not all.

    Args:
        sets: the sets that a stage is validated on.
        versions: data name → version of its manifest.
    """
    return {
        one.name: versions[one.data]
        + (f"[{one.patterns}]" if one.patterns else "")
        + (f"[:{one.limit}]" if one.limit else "")
        for one in sets
    }


def _figure_tag(name: str) -> str:
    return name.replace("/", ".")


def _measured_tag(name: str) -> str:
    return MEASURED_TAG + _figure_tag(name)


def register(
    client: MlflowClient,
    model_name: str,
    run_id: str,
    weights: Path,
    lineage: Lineage,
    promotion: MetricConfig | None,
) -> ModelVersion:
    """Register a finished stage's weights once: a second call with the same run and weights returns the first version.

    The alias with the stage's name moves to the version; `champion` moves too, if the promotion rule says so.
    """
    tags = lineage.tags() | {_WEIGHTS_TAG: file_sha256(weights)}
    version = _registered(client, model_name, run_id, tags)
    if version is None:
        # A version is made of a model that is logged first, which is not done again where only the second step failed.
        logged = _logged(client, run_id, tags[_WEIGHTS_TAG]) or _log_model(run_id, weights, tags[_WEIGHTS_TAG])
        with mlflow_client.asked_once(), contextlib.redirect_stderr(io.StringIO()):
            version = mlflow.register_model(logged, model_name, tags=tags)
    move_alias(client, model_name, lineage.stage, version.version)
    if _improves(client, model_name, lineage, promotion):
        move_alias(client, model_name, CHAMPION, version.version)
    return version


def move_alias(client: MlflowClient, model_name: str, alias: str, version: str) -> str | None:
    """Point an alias to a version, and keep the one before in the model's tags. Returns that; None for a new alias."""
    before = _alias(client, model_name, alias)
    if before == str(version):
        return before
    earlier = _earlier_versions(client, model_name, alias)
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
            f"models:/{model_name}@{alias}: no such model at {place_of(client)}; there is: {_known(client)}"
        )
    versions = _earlier_versions(client, model_name, alias)
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
    found = _version_by_alias(client, model_name, alias)
    return None if found is None else str(found.version)


def _version_by_alias(client: MlflowClient, model_name: str, alias: str) -> ModelVersion | None:
    """None if there is no such alias or model. Raises MLflow's error if it does not say so: it is away, or refuses."""
    try:
        return client.get_model_version_by_alias(model_name, alias)
    except MlflowException as error:
        if error.get_http_status_code() not in (HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND):
            raise
        return None


def _earlier_versions(client: MlflowClient, model_name: str, alias: str) -> list[str]:
    """Versions that an alias pointed to before, the most recent one last."""
    tags = client.get_registered_model(model_name).tags
    found: list[str] = json.loads(tags.get(f"earlier.{alias}", "[]"))
    return found


def _remember(client: MlflowClient, model_name: str, alias: str, versions: list[str]) -> None:
    client.set_registered_model_tag(model_name, f"earlier.{alias}", json.dumps(versions[-_REMEMBERED:]))


def _registered(client: MlflowClient, model_name: str, run_id: str, tags: Mapping[str, str]) -> ModelVersion | None:
    """The version that an earlier attempt registered before it could store its result; None if there is none."""
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    same = [
        found
        for found in versions
        if found.name == model_name
        and all(found.tags.get(name) == tags[name] for name in ("config_hash", _WEIGHTS_TAG))
    ]
    return max(same, key=lambda found: int(found.version), default=None)


def _logged(client: MlflowClient, run_id: str, weights_sha256: str) -> str | None:
    """URI of the model that an earlier attempt logged, complete; None if there is none."""
    experiments = [client.get_run(run_id).info.experiment_id]
    models = client.search_logged_models(experiments, filter_string=f"source_run_id = '{run_id}'")
    complete = [
        found.model_uri
        for found in models
        if found.status == LoggedModelStatus.READY and found.tags.get(_WEIGHTS_TAG) == weights_sha256
    ]
    return complete[0] if complete else None


def _log_model(run_id: str, weights: Path, weights_sha256: str) -> str:
    """Log the model to a run. Returns its URI."""
    # MLflow loads what it logs, to try the example. In a driver that must take no memory of the workers' GPU.
    on_the_cpu = mlflow_client.in_environment(_LOADED_WITH, json.dumps({"device": "cpu"}))
    # Silences MLflow, which reports its steps. Failures are raised.
    with on_the_cpu, contextlib.redirect_stderr(io.StringIO()), mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"weights": str(weights)},
            model_config={"device": "auto"},  # what may be changed when the model is loaded
            tags={_WEIGHTS_TAG: weights_sha256},
            code_paths=[str(Path(gmflow.__file__).parent)],
            signature=_SIGNATURE,
            input_example=_example(),
            pip_requirements=[
                f"{package}=={package_version(package).partition('+')[0]}"
                for package in ("mlflow", "numpy", "opencv-python-headless", "safetensors", "torch")
            ],
        )
    uri: str = logged.model_uri
    return uri


def _example() -> list[dict[str, str]]:
    """A pair as a client sends it over HTTP: two PNG files in base64."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    names = ("image0", "image1")
    return [{n: base64.b64encode(encode_frame_png(f)).decode() for n, f in zip(names, frames, strict=True)}]


def _improves(client: MlflowClient, model_name: str, lineage: Lineage, promotion: MetricConfig | None) -> bool:
    if promotion is None:
        return True
    figure = lineage.metrics.get(promotion.name)
    if figure is None:  # a model that was not measured replaces no champion
        return False
    champion = _version_by_alias(client, model_name, CHAMPION)
    reigning = None if champion is None else champion.tags.get(_figure_tag(promotion.name))
    if champion is None or reigning is None:
        return True
    measured, theirs = (tags.get(_measured_tag(promotion.set_name)) for tags in (lineage.tags(), champion.tags))
    if theirs is not None and measured != theirs:
        log.warning(
            "%s stays at version %s: its %s was measured on other pairs (%s, not %s); evaluate both on one set, then "
            "move it with pipelines/registry.py promote",
            *(CHAMPION, champion.version, promotion.set_name, theirs, measured),
        )
        return False
    return float(f"{figure:{_FIGURE}}") < float(reigning)  # both as tags hold them


def standing(client: MlflowClient, version: ModelVersion, promotion: MetricConfig | None) -> str:
    """A line that says as what a version is registered, and whether it is the champion or which version is."""
    champion = _version_by_alias(client, version.name, CHAMPION)
    registered = f"registered as {numbered(version)}"
    if champion is None:
        return f"{registered}; there is no {CHAMPION} yet"
    figure = None if promotion is None else champion.tags.get(_figure_tag(promotion.name))
    by = "" if promotion is None or figure is None else f", {promotion.name} {figure}"
    if str(champion.version) != str(version.version):
        return f"{registered}; the {CHAMPION} is still version {champion.version}{by}"
    before = [one for one in _earlier_versions(client, version.name, CHAMPION) if one != str(champion.version)]
    return f"{registered}, now the {CHAMPION}{by}" + (f" (before: version {before[-1]})" if before else "")


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
        known = _known(client)
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


def _known(client: MlflowClient) -> str:
    references = [
        f"models:/{model.name}@{alias}" for model in registered_models(client) for alias in sorted(model.aliases)
    ]
    return ", ".join(references) or "nothing is registered"


def versions_of(client: MlflowClient, name: str) -> Sequence[ModelVersion]:
    """Every version of a model, in no order."""
    quote = '"' if "'" in name else "'"  # others' models may be named in ways that ours are not
    return client.search_model_versions(f"name = {quote}{name}{quote}")
