"""Looking back at a finished dataset: is every byte what the manifest promises, and what is in it."""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datasets_etl.errors import DamagedError, DataError
from datasets_etl.etl import run_tasks
from datasets_etl.manifest import Manifest, SampleEntry, ShardEntry
from datasets_etl.samples import FlowSample, decode_sample
from datasets_etl.storage import open_store

MOTION_EDGES = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
"""Lower edges of the motion histogram's bins, pixels; the last bin is open."""


@dataclass(frozen=True)
class Damage:
    """One thing that is not as the manifest promises, in a line."""

    shard: str
    problem: str


def verify_manifest(
    manifest: Manifest,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Damage]:
    """Read every shard back by Ray tasks: size, SHA-256, each sample's checksum and whether it decodes.

    Args:
        manifest: loaded, so its own content is already checked against its name.
        workers: shards read at a time; None for one for each CPU of the cluster.
        on_progress: called with samples done and samples in all.

    Returns:
        What is wrong, in the manifest's order; empty for a whole dataset.

    Raises:
        DataError: storage does not answer, or denies access.
    """
    found: dict[str, list[Damage]] = {}
    done = 0
    on_progress(0, len(manifest.samples))
    for (_, shard), damages in run_tasks(
        _verify_task, [(manifest.store().url, shard) for shard in manifest.shards], workers
    ):
        found[shard.name] = damages
        done += len(shard.samples)
        on_progress(done, len(manifest.samples))
    return [damage for shard in manifest.shards for damage in found[shard.name]]


def _verify_task(root: str, shard: ShardEntry) -> list[Damage] | DataError:
    store = open_store(root)
    try:
        size = store.size(shard.name)
        if size is None:
            return [Damage(shard.name, "it is not there")]
        data = store.read(shard.name, size)
    except DamagedError as error:
        return [Damage(shard.name, str(error))]
    except DataError as error:  # of storage, and nothing is known of the shard
        return error
    problems = []
    if len(data) != shard.bytes:
        problems.append(f"{len(data)} bytes instead of {shard.bytes}")
    elif hashlib.sha256(data).hexdigest() != shard.sha256:
        problems.append("its SHA-256 is not the manifest's")
    checked = (_sample_problem(data[entry.offset : entry.offset + entry.length], entry) for entry in shard.samples)
    return [Damage(shard.name, problem) for problem in (*problems, *checked) if problem is not None]


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
    """Valid pixels by the length of their flow, one count for each of MOTION_EDGES. Int64 [bins]."""
    counts = np.zeros(len(MOTION_EDGES), np.int64)
    for sample in samples:
        if sample.flow is not None and sample.valid is not None:
            motion = np.hypot(sample.flow[..., 0], sample.flow[..., 1])[sample.valid]  # [valid pixels]
            counts += np.histogram(motion, [*MOTION_EDGES, np.inf])[0]
    return counts


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of the numbers, evenly spread over them, the first among them."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[i * len(numbers) // count] for i in range(count)]
