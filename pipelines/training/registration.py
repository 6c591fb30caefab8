"""Registration of what a stage or trial ended with, with its lineage."""

import base64
import contextlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version as package_version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType

import gmflow
from datasets_etl.formats import encode_frame_png
from datasets_etl.objects import file_sha256
from pipelines.training import mlflow_client
from pipelines.training.aliases import CHAMPION, earlier_versions, move_alias, version_by_alias
from pipelines.training.data_config import MetricConfig, SetConfig
from pipelines.training.model_versions import numbered

log = logging.getLogger(__name__)

_FIGURE = ".6g"  # how tags hold figures
MEASURED_TAG = "measured."
"""Prefix of a version's tag; a validation set's name follows. Its value says which pairs the metrics come from."""

_WEIGHTS_TAG = "weights_sha256"

_LOADED_WITH = "MLFLOW_PYFUNC_INFERENCE_CONFIG"

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
    champion = version_by_alias(client, model_name, CHAMPION)
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
    champion = version_by_alias(client, version.name, CHAMPION)
    registered = f"registered as {numbered(version)}"
    if champion is None:
        return f"{registered}; there is no {CHAMPION} yet"
    figure = None if promotion is None else champion.tags.get(_figure_tag(promotion.name))
    by = "" if promotion is None or figure is None else f", {promotion.name} {figure}"
    if str(champion.version) != str(version.version):
        return f"{registered}; the {CHAMPION} is still version {champion.version}{by}"
    before = [one for one in earlier_versions(client, version.name, CHAMPION) if one != str(champion.version)]
    return f"{registered}, now the {CHAMPION}{by}" + (f" (before: version {before[-1]})" if before else "")
