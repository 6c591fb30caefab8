"""The weights of a sweep, kept on storage as they were when the sweep began.

An alias may move, even to a trial of this sweep, and a file may be replaced. So the weights that the reference stood
for at first are kept in the sweep's folder, where every node reaches them, beside a note of what they are.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from datasets_etl.objects import ObjectStore, file_sha256
from gmflow import GMFlow, load_weights, save_weights
from pipelines.errors import naming_reference
from pipelines.references import fetch_weights, has_moved
from pipelines.sweeping.accuracy import Weights
from pipelines.sweeping.config import SweepConfig


def pinned_weights(config: SweepConfig, store: ObjectStore, say: Callable[[str], None]) -> Weights | None:
    """The weights that the sweep keeps; the first call fetches them. None if the config names no weights.

    Args:
        config: config of the sweep.
        store: the sweep's folder.
        say: called with a line if the reference stands for other weights by now.

    Raises GMFlowError if they are not of the config's model.
    """
    if config.weights is None:
        return None
    if not weights_are_pinned(store, config.weights):
        return _pin(config, config.weights, store)
    noted: dict[str, str] = json.loads(store.read(_note_key(config.weights)))
    weights = _as_kept(store, noted)
    with tempfile.TemporaryDirectory(prefix="gmflow-weights-") as folder:
        kept = Path(folder) / "kept.safetensors"
        kept.write_bytes(store.read(weights.url.rpartition("/")[2]))
        with naming_reference(config.weights, kept):
            load_weights(GMFlow(config.architecture), kept)
    if has_moved(config.weights, noted["source"], config.mlflow.tracking_uri):
        say(
            f"goes on with {noted['source']}, what {config.weights} was when this sweep began; another name= starts a "
            "sweep of what it is now"
        )
    return weights


def weights_are_pinned(store: ObjectStore, reference: str) -> bool:
    """Whether a sweep's folder keeps the weights that this reference stood for."""
    return store.size(_note_key(reference)) is not None


def _pin(config: SweepConfig, reference: str, store: ObjectStore) -> Weights:
    model = GMFlow(config.architecture)
    with tempfile.TemporaryDirectory(prefix="gmflow-weights-") as folder:
        path, source = fetch_weights(reference, Path(folder), config.mlflow.tracking_uri)
        note = {"reference": reference, "source": source, "version": file_sha256(path)[:16]}
        with naming_reference(reference, path):
            load_weights(model, path)
        kept = Path(folder) / "kept.safetensors"
        save_weights(model, kept)
        weights = _as_kept(store, note)
        store.upload(kept, weights.url.rpartition("/")[2])
    store.write(_note_key(reference), json.dumps(note).encode())  # last: it says that the weights are there
    return weights


def _note_key(reference: str) -> str:
    return f"weights-of-{hashlib.sha256(reference.encode()).hexdigest()[:16]}.json"


def _as_kept(store: ObjectStore, note: Mapping[str, str]) -> Weights:
    return Weights(f"{store.url}/weights-{note['version']}.safetensors", note["version"], note["source"])
