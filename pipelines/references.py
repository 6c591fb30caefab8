"""Models by reference: registered ones, published `.pth`, our `.safetensors`, and checkpoints of stages.

MLflow is imported only for registered models: that takes as long as everything else in a command that predicts.
"""

import tempfile
from pathlib import Path

from datasets_etl.objects import ObjectStore, file_sha256
from datasets_etl.storage import split_url
from gmflow import GMFlow, load_model, save_weights
from pipelines.errors import USER_ERRORS, PipelineError, naming_reference
from pipelines.training.checkpoints import checkpoint_model

_REGISTERED = "models:/"
_CHECKPOINT = ".pt"


def resolve_model(reference: str, tracking_uri: str | None = None) -> GMFlow:
    """The trainable model of a reference, in evaluation mode. Arguments and errors are those of `fetch_weights`."""
    return resolve_named(reference, tracking_uri)[0]


def resolve_named(reference: str, tracking_uri: str | None = None) -> tuple[GMFlow, str]:
    """`resolve_model`, and what the reference stands for now, see `fetch_weights`."""
    with tempfile.TemporaryDirectory(prefix="gmflow-model-") as folder:
        path, found = fetch_weights(reference, Path(folder), tracking_uri)
        with naming_reference(reference, path):
            return load_model(path), found


def fetch_weights(reference: str, folder: Path, tracking_uri: str | None = None) -> tuple[Path, str]:
    """The weights file of a reference, copied into a local folder.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or path or URL of a published `.pth`, our
            `.safetensors`, or a checkpoint of a stage.
        folder: the folder for the copy.
        tracking_uri: MLflow of the registry; for None see `mlflow_client.tracking_uri`.

    Returns:
        The file; and what the reference stands for now: "models:/NAME/N", or the file with the start of its SHA-256.

    Raises:
        PipelineError: there is no such model.
        DataError: there is no such file.
    """
    if reference.startswith(_REGISTERED):
        from pipelines.training import model_versions

        client, version = model_versions.look_up(reference, tracking_uri)
        return model_versions.download(client, version, folder), model_versions.numbered(version)
    store, name = _split_file(reference)
    path = folder / name
    if path.suffix == _CHECKPOINT:
        path = path.with_suffix(".safetensors")
        save_weights(checkpoint_model(reference), path)
    else:
        path.write_bytes(store.read(name))
    return path, f"{reference} (sha256 {file_sha256(path)[:16]})"


def stands_for(reference: str, tracking_uri: str | None = None) -> str:
    """What a reference stands for now, as `fetch_weights` names it. A registered model is not fetched for this."""
    if reference.startswith(_REGISTERED):
        from pipelines.training import model_versions

        return model_versions.numbered(model_versions.look_up(reference, tracking_uri)[1])
    with tempfile.TemporaryDirectory(prefix="gmflow-model-") as folder:
        return fetch_weights(reference, Path(folder), tracking_uri)[1]


def has_moved(reference: str, pinned: str, tracking_uri: str | None = None) -> bool:
    """Whether a reference now stands for something else than what was `pinned`, as `fetch_weights` names it.

    False if that cannot be found out: whoever pinned it has what it needs.
    """
    from mlflow.exceptions import MlflowException

    try:
        return stands_for(reference, tracking_uri) != pinned
    except (*USER_ERRORS, MlflowException):
        return False


def check_reference(reference: str, tracking_uri: str | None = None) -> None:
    """Check that a reference leads to a model or file, without fetching it. Raises PipelineError if it does not."""
    if reference.startswith(_REGISTERED):
        from pipelines.training import model_versions

        model_versions.look_up(reference, tracking_uri)
        return
    store, name = _split_file(reference)
    if store.size(name) is None:
        raise PipelineError(f"{reference}: no such file")


def _split_file(reference: str) -> tuple[ObjectStore, str]:
    if not reference.endswith((".pth", ".safetensors", _CHECKPOINT)):
        raise PipelineError(
            f"{reference}: no model reference; write models:/NAME@ALIAS, a .pth or .safetensors, or a checkpoint's .pt"
        )
    return split_url(reference)
