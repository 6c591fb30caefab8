"""What a stage's training begins with, kept in its folder: its initial weights, and the mark of this training."""

import tempfile
import uuid
from pathlib import Path

import torch

from datasets_etl.objects import ObjectStore
from gmflow import GMFlow, load_weights, save_weights
from pipelines.errors import naming_reference
from pipelines.references import fetch_weights, has_moved
from pipelines.training.checkpoints import INITIAL_WEIGHTS
from pipelines.training.config import ModelConfig

_INITIAL_SOURCE = "init.txt"
_MARK = "begun.txt"


def weights_are_pinned(folder: ObjectStore) -> bool:
    """Whether a stage's folder already holds its initial weights."""
    return folder.size(_INITIAL_SOURCE) is not None


def moved_start(folder: ObjectStore, reference: str | None, tracking_uri: str | None) -> str:
    """A line if a stage's initial weights are no longer what the reference stands for; empty otherwise."""
    if reference is None or not weights_are_pinned(folder):
        return ""
    pinned = folder.read(_INITIAL_SOURCE).decode()
    if not has_moved(reference, pinned, tracking_uri):
        return ""
    return f"starts from {pinned}, what {reference} was when it began; another name= starts from what it is now"


def training_mark(folder: ObjectStore) -> str:
    """The random mark of the training in a stage's folder; empty if it has none.

    A training that was deleted there had another mark, so the new one does not continue its curves in MLflow.
    """
    return folder.read(_MARK).decode() if folder.size(_MARK) is not None else ""


def write_training_mark(folder: ObjectStore) -> None:
    """Give the training in a stage's folder its mark."""
    folder.write(_MARK, uuid.uuid4().hex.encode())


def provide_initial_weights(
    folder: ObjectStore, model: ModelConfig, seed: int, reference: str | None, tracking_uri: str | None
) -> str:
    """Pin a stage's initial weights in its folder, once: later an alias may move, or a file may be replaced.

    Returns what was pinned, for the lineage: "models:/NAME/N", a file with the first 16 hex digits of its SHA-256, or
    "random".

    Args:
        folder: the stage's folder on storage.
        model: config of the model to build.
        seed: seed of the random weights.
        reference: models:/…, .pth or .safetensors to take the weights from; None leaves them random.
        tracking_uri: URI of the registry that resolves models:/… references.
    """
    if weights_are_pinned(folder):
        return folder.read(_INITIAL_SOURCE).decode()
    source = "random"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initial = GMFlow(model.build())
    with tempfile.TemporaryDirectory(prefix="gmflow-init-") as scratch:
        if reference is not None:
            fetched, source = fetch_weights(reference, Path(scratch), tracking_uri)
            with naming_reference(reference, fetched):
                load_weights(initial, fetched)
        path = Path(scratch) / f"pinned-{INITIAL_WEIGHTS}"
        save_weights(initial, path)
        folder.upload(path, INITIAL_WEIGHTS)
    write_training_mark(folder)
    folder.write(_INITIAL_SOURCE, source.encode())  # last: it says that the weights are there
    return source
