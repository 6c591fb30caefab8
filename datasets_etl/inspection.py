"""Inspect a finished dataset: check every byte against the manifest, and summarise the motion in it."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datasets_etl.errors import DamagedError, DataError
from datasets_etl.etl import run_tasks
from datasets_etl.manifest import Manifest, SampleEntry, ShardEntry
from datasets_etl.objects import ObjectStore
from datasets_etl.samples import FlowSample, decode_sample
from datasets_etl.storage import open_store

MOTION_EDGES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
"""Lower edges of the motion histogram's bins, in pixels; the last bin has no upper edge."""

_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Damage:
    """One deviation from the manifest, described in one line."""

    shard: str
    problem: str


@dataclass(frozen=True)
class VerifyTask:
    """What a node needs to read one shard back: the URL of the sharded dataset, and what its manifest says of it."""

    dataset: str
    shard: ShardEntry


def verify_manifest(
    manifest: Manifest,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Damage]:
    """Read every shard back with Ray tasks: check size, SHA-256, each sample's checksum, and that each sample decodes.

    Args:
        manifest: a loaded manifest; loading it has already checked its content against its name.
        workers: number of shards read at a time; None: one for each CPU of the cluster.
        on_progress: called with the number of samples done and the number of all samples.

    Returns:
        All damage, in the manifest's order; empty for an intact dataset.

    Raises:
        DataError: storage does not answer, or denies access.
    """
    found: dict[str, list[Damage]] = {}
    done = 0
    on_progress(0, len(manifest.samples))
    tasks = [VerifyTask(manifest.store().url, shard) for shard in manifest.shards]
    for task, damages in run_tasks(_verify_task, tasks, workers):
        found[task.shard.name] = damages
        done += len(task.shard.samples)
        on_progress(done, len(manifest.samples))
    return [damage for shard in manifest.shards for damage in found[shard.name]]


def _verify_task(task: VerifyTask) -> list[Damage] | DataError:
    store, shard = open_store(task.dataset), task.shard
    try:
        size = store.size(shard.name)
        if size is None:
            return [Damage(shard.name, "it is not there")]
        return [Damage(shard.name, problem) for problem in _problems(store, shard, size)]
    except DamagedError as error:
        return [Damage(shard.name, str(error))]
    except DataError as error:  # a storage error, which says nothing about the shard
        return error


def _problems(store: ObjectStore, shard: ShardEntry, size: int) -> list[str]:
    """What is wrong with a shard of `size` bytes. It is read sample by sample: memory holds one at a time."""
    digest = hashlib.sha256()
    position = 0
    found = []
    for entry in shard.samples:
        digest.update(_read(store, shard.name, position, min(entry.offset, size)))
        data = _read(store, shard.name, entry.offset, min(entry.offset + entry.length, size))
        digest.update(data)
        position = entry.offset + len(data)
        found.append(_sample_problem(data, entry))
    for start in range(position, size, _PIECE_BYTES):
        digest.update(_read(store, shard.name, start, min(start + _PIECE_BYTES, size)))
    if size != shard.bytes:
        found.insert(0, f"{size} bytes instead of {shard.bytes}")
    elif digest.hexdigest() != shard.sha256:
        found.insert(0, "its SHA-256 is not the manifest's")
    return [problem for problem in found if problem is not None]


def _read(store: ObjectStore, key: str, start: int, end: int) -> bytes:
    return store.read_range(key, start, end - start) if end > start else b""


def _sample_problem(data: bytes, entry: SampleEntry) -> str | None:
    if len(data) != entry.length:
        return f"sample {entry.key}: {len(data)} bytes instead of {entry.length}"
    if zlib.crc32(data) != entry.crc32:
        return f"sample {entry.key}: damaged, its checksum differs"
    try:
        sample = decode_sample(data, f"sample {entry.key}")
    except DataError as error:
        return str(error)
    invalid = None if sample.valid is None else int((~sample.valid).sum())
    read = (sample.key, sample.subset, *sample.image0.shape[:2], invalid)
    promised = (entry.key, entry.subset, entry.height, entry.width, entry.invalid_pixels)
    return None if read == promised else f"sample {entry.key}: it holds {read}, the manifest says {promised}"


def motion_histogram(samples: Iterable[FlowSample]) -> npt.NDArray[np.int64]:
    """Numbers of valid pixels by the length of their flow, int64 [bins], with one bin for each of MOTION_EDGES."""
    counts = np.zeros(len(MOTION_EDGES), np.int64)
    for sample in samples:
        if sample.flow is not None and sample.valid is not None:
            motion = np.hypot(sample.flow[..., 0], sample.flow[..., 1])[sample.valid]  # [valid pixels]
            counts += np.histogram(motion, [*MOTION_EDGES, np.inf])[0]
    return counts


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly spread and including the first."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[i * len(numbers) // count] for i in range(count)]
