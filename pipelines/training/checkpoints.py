"""Checkpoints of a stage on storage: written beside the training, whole or not there, checked when read.

A checkpoint is two objects in the stage's folder: `checkpoints/step_00000100-HASH.pt`, named by its content, and then,
vouching for it, `checkpoints/step_00000100.json`. One without its facts does not exist; one that is replaced stands
until the facts of the new one do.
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
from datasets_etl.storage import ObjectStore, open_store, split_url
from gmflow import GMFlow, load_model
from pipelines.errors import PipelineError
from pipelines.training import state
from pipelines.training.code_version import code_version

FORMAT_VERSION = 5

INITIAL_WEIGHTS = "init.safetensors"
"""In a stage's folder, beside its checkpoints: what it starts from, with the model's configuration."""

_PREFIX = "checkpoints/step_"
_OURS = re.compile(r"checkpoints/step_(?P<step>\d{8})(\.json|-[0-9a-f]{16}\.pt)")
_DATA = re.compile(r"step_\d{8}-(?P<sha256>[0-9a-f]{16})\.pt")


@dataclass(frozen=True)
class KeepPolicy:
    """Which checkpoints stay: the newest `last`, and the best by a metric (lower is better) where one is named."""

    last: int
    best_by: str | None = None


class OtherFormatError(PipelineError):
    """A checkpoint that another version of this software wrote: nothing is wrong with it."""


@dataclass(frozen=True)
class Facts:
    """What vouches for a checkpoint.

    Attributes:
        step: steps done.
        sha256: of the stored bytes.
        metrics: of the validation at that step, if there was one.
        format, torch, code: versions that wrote it.
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
        """Steps of the checkpoints there are, newest first."""
        return sorted((step for key, step in self._stored() if key.endswith(".json")), reverse=True)

    def _stored(self) -> list[tuple[str, int]]:
        """Keys and steps of what belongs to checkpoints; what somebody else keeps beside them is nobody's business."""
        named = (_OURS.fullmatch(found.key) for found in self.folder.walk(_PREFIX))
        return [(match[0], int(match["step"])) for match in named if match]

    def write(self, snapshot: dict[str, Any], metrics: Mapping[str, float]) -> None:
        """Store a snapshot of `TrainingState`; one of the same step is replaced."""
        data = state.to_bytes(snapshot)
        facts = Facts(snapshot["step"], hashlib.sha256(data).hexdigest(), dict(metrics), code=code_version())
        self.folder.write(_data_key(facts), data)
        self.folder.write(f"{_key(facts.step)}.json", json.dumps(asdict(facts)).encode())

    def read(self, step: int) -> dict[str, Any]:
        """The snapshot of a step. Raises PipelineError where it is damaged or of another version."""
        facts = self._facts(step)
        if self.folder.size(_data_key(facts)) is None:
            facts = self._facts(step)  # replaced meanwhile, by rank 0 or by workers that a killed driver left
        key = _data_key(facts)
        where = f"{self.folder.url}/{key}"
        if self.folder.size(key) is None:
            raise PipelineError(f"{where}: damaged checkpoint: it is gone")
        data = self.folder.read(key)
        if hashlib.sha256(data).hexdigest() != facts.sha256:
            raise PipelineError(f"{where}: damaged checkpoint: its content is not what was written")
        return state.from_bytes(data)

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest whole snapshot. What is damaged is told, set aside for good, and the one before it is taken.

        Raises:
            OtherFormatError: it is whole, and another version's.
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
        """Delete what the policy does not keep, and what no facts vouch for."""
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
        """None where they are damaged, or another version's."""
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
    """What the stage of a folder starts from, in evaluation mode."""
    with tempfile.TemporaryDirectory(prefix="gmflow-init-") as scratch:
        path = Path(scratch) / INITIAL_WEIGHTS
        path.write_bytes(folder.read(INITIAL_WEIGHTS))
        return load_model(path)


def checkpoint_model(url: str) -> GMFlow:
    """The model of a stage's checkpoint, in evaluation mode: with averaged weights where the stage keeps them.

    Args:
        url: of a `.pt` in a stage's `checkpoints/`.

    Raises:
        PipelineError: it is none, or damaged.
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
    """Writes snapshots in a thread, so that training goes on meanwhile.

    While one is written only the newest waits, beside the best one where that is kept. A write that fails (storage away
    for longer than it is waited for, a full disk) is told and left at that: the checkpoint before stays, the next one
    is tried.

    Args:
        store: where they go.
        policy: what is deleted after each.
        warn: told, in a line, of a write that failed; called from the thread.
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
        """Have a snapshot written as soon as the one before is; returns at once."""
        with self._changed:
            best = min([*self._waiting, (snapshot, metrics)], key=lambda one: self._score(one[1]))
            self._waiting = [(snapshot, metrics)]
            if best[0] is not snapshot and self._score(best[1]) < math.inf:
                self._waiting.insert(0, best)
            self._changed.notify_all()

    def _score(self, metrics: Mapping[str, float]) -> float:
        """By what the best is kept; infinite where none is."""
        return math.inf if self._policy.best_by is None else metrics.get(self._policy.best_by, math.inf)

    def flush(self) -> None:
        """Wait until the newest snapshot is stored. Raises what its write met."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        """End the thread after what it is writing."""
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
        except Exception as error:  # noqa: BLE001 (raised by `flush`; without this thread there would be none)
            self._warn(f"checkpoint of step {snapshot['step']} could not be written ({error}); the one before stays")
            return error
        try:
            self._store.prune(self._policy)
        except Exception as error:  # noqa: BLE001 (what is stored is stored)
            self._warn(f"checkpoints that need not be kept could not be deleted ({error})")
        return None
