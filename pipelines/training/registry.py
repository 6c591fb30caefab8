"""Registered models with their lineage, and models by reference."""

import contextlib
import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

import gmflow
from datasets_etl.storage import split_url
from gmflow import GMFlow, load_model
from pipelines.errors import PipelineError
from pipelines.training import tracking
from pipelines.training.config import MetricConfig

CHAMPION = "champion"

_SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, 2, -1, -1, 3))]),
    outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, 2))]),
)


@dataclass(frozen=True)
class Lineage:
    """Where a model comes from: all of it becomes tags of the version.

    Attributes:
        stage: name of the stage.
        parent: "models:/NAME/N" of the stage before, the reference it was initialised from, or "random".
        manifests: data name → manifest URL the stage trained on.
        config_hash: names all that decided the weights.
        code_version: of this project.
        metrics: of the last validation, such as "val/sintel/training-clean/epe".
    """

    stage: str
    parent: str
    manifests: Mapping[str, str]
    config_hash: str
    code_version: str
    metrics: Mapping[str, float]

    def tags(self) -> dict[str, str]:
        return {
            "stage": self.stage,
            "parent": self.parent,
            "manifests": json.dumps(dict(self.manifests), sort_keys=True),
            "config_hash": self.config_hash,
            "code_version": self.code_version,
            **{name.replace("/", "."): f"{value:.6g}" for name, value in self.metrics.items()},
        }


def register(
    client: MlflowClient,
    model_name: str,
    run_id: str,
    weights: Path,
    lineage: Lineage,
    promotion: MetricConfig | None,
) -> ModelVersion:
    """Register a finished stage's weights, once: a second call with the same lineage returns the first version.

    The alias of the stage's name moves to it; `champion` too, if the promotion rule says so.
    """
    version = _registered(client, model_name, lineage) or _log_model(model_name, run_id, weights, lineage)
    client.set_registered_model_alias(model_name, lineage.stage, version.version)
    if _improves(client, model_name, lineage, promotion):
        client.set_registered_model_alias(model_name, CHAMPION, version.version)
    return version


def _registered(client: MlflowClient, model_name: str, lineage: Lineage) -> ModelVersion | None:
    """The version of an attempt that ended between registering and saying so."""
    try:
        versions = client.search_model_versions(f"name = '{model_name}'")
    except MlflowException:
        return None
    same = [found for found in versions if found.tags.get("config_hash") == lineage.config_hash]
    return max(same, key=lambda found: int(found.version), default=None)


def _log_model(model_name: str, run_id: str, weights: Path, lineage: Lineage) -> ModelVersion:
    # MLflow advises type hints on predict (but knows none for arrays) and tells what it does; failures are raised.
    with contextlib.redirect_stderr(io.StringIO()), mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"weights": str(weights)},
            code_paths=[str(Path(gmflow.__file__).parent)],
            signature=_SIGNATURE,
            input_example=np.zeros((1, 2, 64, 64, 3), np.uint8),
            pip_requirements=[
                f"{package}=={package_version(package).partition('+')[0]}"
                for package in ("mlflow", "numpy", "opencv-python-headless", "safetensors", "torch")
            ],
        )
        return mlflow.register_model(logged.model_uri, model_name, tags=lineage.tags())


def _improves(client: MlflowClient, model_name: str, lineage: Lineage, promotion: MetricConfig | None) -> bool:
    if promotion is None:
        return True
    try:
        champion = client.get_model_version_by_alias(model_name, CHAMPION)
    except MlflowException:
        return True
    reigning = champion.tags.get(promotion.name.replace("/", "."))
    return reigning is None or lineage.metrics[promotion.name] < float(reigning)


def resolve_model(reference: str, tracking_uri: str | None = None) -> GMFlow:
    """The trainable model of a reference, in evaluation mode. Arguments and errors as of `fetch_weights`."""
    with tempfile.TemporaryDirectory(prefix="gmflow-model-") as folder:
        return load_model(fetch_weights(reference, Path(folder), tracking_uri)).eval()


def fetch_weights(reference: str, folder: Path, tracking_uri: str | None = None) -> Path:
    """The weights file of a reference, copied into a local folder.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or path or URL of a published `.pth` or our
            `.safetensors`.
        folder: where it goes.
        tracking_uri: of the registry; None as in `tracking.tracking_uri`.

    Raises:
        PipelineError: no such model.
        DataError: no such file.
    """
    if reference.startswith("models:/"):
        return _download(reference, tracking_uri, folder)
    if not reference.endswith((".pth", ".safetensors")):
        raise PipelineError(f"{reference}: no model reference; write models:/NAME@ALIAS, or a .pth or .safetensors")
    store, name = split_url(reference)
    path = folder / name
    path.write_bytes(store.read(name))
    return path


def _download(reference: str, tracking_uri: str | None, folder: Path) -> Path:
    client = tracking.connect(tracking_uri)
    name, _, alias = reference.removeprefix("models:/").partition("@")
    name, _, number = name.partition("/")
    try:
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        uri = f"models:/{name}/{version.version}"
        local = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
    except MlflowException as error:
        known = ", ".join(_references(client)) or "nothing is registered"
        raise PipelineError(f"{reference}: no such model at {client.tracking_uri}; there is: {known}") from error
    found = sorted(local.rglob("*.safetensors"))
    if not found:
        raise PipelineError(f"{reference}: registered by something else than this pipeline: no safetensors in it")
    return found[0]


def _references(client: MlflowClient) -> list[str]:
    return [
        f"models:/{model.name}@{alias}"
        for model in client.search_registered_models()
        for alias in sorted(model.aliases)
    ]
