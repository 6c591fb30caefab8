"""Checkpoints of a stage on storage: written while training continues, complete or absent, verified when read.

A checkpoint is two objects in the stage's folder: first `checkpoints/step_00000100-HASH.pt`, named by its content, and
then `checkpoints/step_00000100.json`, its facts, which vouch for it. Without its facts a checkpoint does not exist. A
checkpoint that is being replaced stays valid until the facts of the new one are written.
"""

import hashlib
import json
import math
import re
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from datasets_etl.errors import DamagedError
from datasets_etl.objects import ObjectStore
from datasets_etl.storage import open_store, split_url
from gmflow import GMFlow, load_model
from pipelines.errors import PipelineError, naming_reference
from pipelines.training import state
from pipelines.training.code_version import code_version

FORMAT_VERSION = 5

INITIAL_WEIGHTS = "init.safetensors"
"""File in a stage's folder, beside its checkpoints: the weights it starts from, with the model's configuration."""

_PREFIX = "checkpoints/step_"
_OURS = re.compile(r"checkpoints/step_(?P<step>\d{8})(\.json|-[0-9a-f]{16}\.pt)")
_DATA = re.compile(r"step_\d{8}-(?P<sha256>[0-9a-f]{16})\.pt")


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints are kept: the newest `last`, and the best by a metric (lower is better) if one is named."""

    last: int
    best_by: str | None = None


class OtherFormatError(PipelineError):
    """A checkpoint in the format of another version of this software; the checkpoint itself is not damaged."""


@dataclass(frozen=True)
class Facts:
    """The facts that vouch for a checkpoint.

    Attributes:
        step: number of steps done.
        sha256: SHA-256 of the stored bytes.
        metrics: metrics of the validation at that step; empty if there was none.
        format, torch, code: the versions that wrote it.
    """

    step: int
    sha256: str
    metrics: dict[str, float]
    format: int = FORMAT_VERSION
    torch: str = str(torch.__version__)
    code: str = ""


class CheckpointStore:
    """The checkpoints in a stage's folder."""

    def __init__(self, folder: ObjectStore) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """The steps of all checkpoints, newest first."""
        return sorted((step for key, step in self._stored() if key.endswith(".json")), reverse=True)

    def _stored(self) -> list[tuple[str, int]]:
        """Keys and steps of the objects that belong to checkpoints; all other files in the folder are left alone."""
        named = (_OURS.fullmatch(found.key) for found in self.folder.walk(_PREFIX))
        return [(match[0], int(match["step"])) for match in named if match]

    def write(self, snapshot: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Store a snapshot of `TrainingState`; it replaces a checkpoint of the same step."""
        data = state.to_bytes(snapshot)
        facts = Facts(snapshot["step"], hashlib.sha256(data).hexdigest(), dict(metrics), code=code_version())
        self.folder.write(_data_key(facts), data)
        self.folder.write(f"{_key(facts.step)}.json", json.dumps(asdict(facts)).encode())

    def read(self, step: int) -> dict[str, Any]:
        """The snapshot of a step. Raises PipelineError if it is damaged or in another version's format."""
        facts = self._facts(step)
        if self.folder.size(_data_key(facts)) is None:
            facts = self._facts(step)  # just replaced, by rank 0 or by workers that a killed driver left
        key = _data_key(facts)
        where = f"{self.folder.url}/{key}"
        if self.folder.size(key) is None:
            raise PipelineError(f"{where}: damaged checkpoint: it is gone")
        data = self.folder.read(key)
        if hashlib.sha256(data).hexdigest() != facts.sha256:
            raise PipelineError(f"{where}: damaged checkpoint: its content is not what was written")
        return state.from_bytes(data)

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest undamaged snapshot; None if there is none.

        For a damaged checkpoint a warning is given and its facts are deleted, so that it is never tried again; then the
        one before it is tried.

        Raises:
            OtherFormatError: the first one without damage is in another version's format.
        """
        for step in self.steps():
            try:
                return self.read(step)
            except OtherFormatError:
                raise
            except (PipelineError, DamagedError) as error:
                warn(f"{error}; going back to the checkpoint before it")
                self.folder.delete(f"{_key(step)}.json")
        return None

    def prune(self, policy: KeepPolicy) -> None:
        """Delete the checkpoints that the policy does not keep, and data that no facts vouch for."""
        steps = self.steps()
        facts = {step: self._sound_facts(step) for step in (steps[: policy.last] if policy.best_by is None else steps)}
        keep = set(steps[: policy.last])
        if (best := policy.best_by) is not None:
            scored = {step: found.metrics.get(best, math.inf) for step, found in facts.items() if found is not None}
            keep.add(min(scored, key=lambda step: scored[step], default=-1))
        for key, step in self._stored():
            found = facts[step] if step in keep else None
            replaced = found is not None and key not in (f"{_key(step)}.json", _data_key(found))
            if step not in keep or replaced:
                self.folder.delete(key)

    def _sound_facts(self, step: int) -> Facts | None:
        """The facts of a step; None if they are damaged or in another version's format."""
        try:
            return self._facts(step)
        except PipelineError:
            return None

    def _facts(self, step: int) -> Facts:
        where = f"{_key(step)}.json"
        try:
            content = json.loads(self.folder.read(where))
            if (found := content["format"]) != FORMAT_VERSION:
                raise OtherFormatError(
                    f"{self.folder.url}/{where}: checkpoint of format {found}, this version reads {FORMAT_VERSION}; "
                    f"go on with the code that wrote it ({content.get('code')}), or train anew in another storage"
                )
            return Facts(**content)
        except (ValueError, TypeError, LookupError) as error:
            raise PipelineError(f"{self.folder.url}/{where}: damaged checkpoint: {error!r}") from error


def _key(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def _data_key(facts: Facts) -> str:
    return f"{_key(facts.step)}-{facts.sha256[:16]}.pt"


def initial_model(folder: ObjectStore) -> GMFlow:
    """The model that the stage of a folder starts from, in evaluation mode."""
    with tempfile.TemporaryDirectory(prefix="gmflow-init-") as scratch:
        path = Path(scratch) / INITIAL_WEIGHTS
        path.write_bytes(folder.read(INITIAL_WEIGHTS))
        with naming_reference(f"{folder.url}/{INITIAL_WEIGHTS}", path):
            return load_model(path)


def checkpoint_model(url: str) -> GMFlow:
    """The model of a stage's checkpoint, in evaluation mode, with averaged weights if the stage keeps them.

    Args:
        url: URL of a `.pt` in a stage's `checkpoints/`.

    Raises:
        PipelineError: the URL is not that of a checkpoint, or the checkpoint is damaged.
    """
    store, name = split_url(url)
    named = _DATA.fullmatch(name)
    if named is None or not store.url.endswith("/checkpoints"):
        raise PipelineError(f"{url}: no checkpoint; write STORAGE/STAGE/checkpoints/step_NUMBER-HASH.pt")
    data = store.read(name)
    if hashlib.sha256(data).hexdigest()[:16] != named["sha256"]:
        raise PipelineError(f"{url}: damaged checkpoint: its content is not what its name says")
    model = initial_model(open_store(store.url.removesuffix("/checkpoints")))
    model.load_state_dict(state.result_weights(state.from_bytes(data)))
    return model


class CheckpointWriter:
    """Writes snapshots in a background thread, so that training continues.

    While one is being written, at most two wait: the newest, and the best if the best is kept. If a write fails
    (storage unreachable for longer than the patience, a full disk), a warning is given and the write is not retried:
    the previous checkpoint stays, and the next one is written when it is due.

    Args:
        store: where snapshots are stored.
        policy: which checkpoints are kept; the others are deleted after each write.
        warn: called with a line of text when a write or a deletion fails, from the background thread.
    """

    def __init__(self, store: CheckpointStore, policy: KeepPolicy, warn: Callable[[str], None]) -> None:
        self._store = store
        self._policy = policy
        self._warn = warn
        self._changed = threading.Condition()
        self._waiting: list[tuple[dict[str, Any], Mapping[str, float]]] = []
        self._busy = False
        self._closed = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(self, snapshot: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Queue a snapshot, to be written after the one in progress; returns at once."""
        with self._changed:
            best = min([*self._waiting, (snapshot, metrics)], key=lambda one: self._score(one[1]))
            self._waiting = [(snapshot, metrics)]
            if best[0] is not snapshot and self._score(best[1]) < math.inf:
                self._waiting.insert(0, best)
            self._changed.notify_all()

    def _score(self, metrics: Mapping[str, float]) -> float:
        """The metric by which the best is kept; infinite if no best is kept or the metric has no value."""
        return math.inf if self._policy.best_by is None else metrics.get(self._policy.best_by, math.inf)

    def flush(self) -> None:
        """Wait until the newest snapshot is stored. Raises the error of its write if that failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """End the thread once it has written all waiting snapshots."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                (snapshot, metrics), self._busy = self._waiting.pop(0), True
            failure = self._written(snapshot, metrics)
            with self._changed:
                self._failure, self._busy = failure, False
                self._changed.notify_all()

    def _written(self, snapshot: dict[str, Any], metrics: Mapping[str, float]) -> Exception | None:
        try:
            self._store.write(snapshot, metrics)
        except Exception as error:  # noqa: BLE001 (`flush` raises it; the thread must live on for later writes)
            self._warn(f"checkpoint of step {snapshot['step']} could not be written ({error}); the one before stays")
            return error
        try:
            self._store.prune(self._policy)
        except Exception as error:  # noqa: BLE001 (the checkpoint itself is stored)
            self._warn(f"checkpoints that need not be kept could not be deleted ({error})")
        return None
