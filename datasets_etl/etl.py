"""A raw dataset → shards and a manifest, by Ray tasks: index, plan, write, publish."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray

from datasets_etl import formats
from datasets_etl.errors import DataError
from datasets_etl.manifest import ShardEntry, build
from datasets_etl.shards import ShardPlan, finished_shard, plan_shards, raw_files, write_shard
from datasets_etl.sources import SOURCES, SampleRef, SourceTree
from datasets_etl.storage import ObjectInfo, open_store

DEFAULT_SHARD_BYTES = 512 * 2**20

# Enough for width and height in every raw format.
_HEAD_BYTES = 64


@dataclass(frozen=True)
class EtlResult:
    """What a run left behind.

    Attributes:
        manifest_url: the published manifest.
        subsets: number of samples of each subset.
        shards: number of shards, `reused` of them from an earlier run.
        raw_bytes: size of the raw files that went in.
        stored_bytes: size of all shards.
        invalid_pixels: pixels without usable ground truth.
    """

    manifest_url: str
    subsets: dict[str, int]
    shards: int
    reused: int
    raw_bytes: int
    stored_bytes: int
    invalid_pixels: int


def run_etl(
    dataset: str,
    source: str,
    target: str,
    *,
    workers: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EtlResult:
    """Shard one dataset. Needs a connected Ray.

    Args:
        dataset: a key of `SOURCES`.
        source: `file://` or `s3://` URL or path of the raw dataset in its official layout.
        target: URL or path; the dataset goes to `target/dataset/`.
        workers: shards written at a time; None for one for each CPU of the cluster.
        shard_bytes: raw bytes of pixels and flow in a shard.
        on_progress: called with samples done and samples in all.

    Raises:
        DataError: the source is missing, empty, of another layout or damaged. No manifest is written then; finished
            shards stay, and the same call goes on from them.
    """
    tree, objects = _open_source(source)
    refs = SOURCES[dataset](tree)
    pixels = _check_sizes(refs, source)
    plans = plan_shards(refs, pixels, {key: info.stamp for key, info in objects.items()}, shard_bytes)
    store = open_store(f"{target.rstrip('/')}/{dataset}")

    entries: dict[int, ShardEntry] = {}
    for plan in plans:
        if (entry := finished_shard(plan, store)) is not None:
            entries[plan.index] = entry
    reused = len(entries)
    on_progress(sum(len(entry.samples) for entry in entries.values()), len(refs))
    missing = [plan for plan in plans if plan.index not in entries]
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    for index, entry in _write_all(missing, source, store.url, at_once):
        entries[index] = entry
        on_progress(sum(len(entry.samples) for entry in entries.values()), len(refs))

    manifest = build(dataset, [entries[plan.index] for plan in plans])
    raw = {path for ref in refs for path in raw_files(ref)}
    return EtlResult(
        manifest_url=manifest.publish(store),
        subsets=manifest.subsets,
        shards=len(plans),
        reused=reused,
        raw_bytes=sum(objects[path].size for path in raw),
        stored_bytes=sum(shard.bytes for shard in manifest.shards),
        invalid_pixels=sum(sample.invalid_pixels or 0 for sample in manifest.samples),
    )


def _open_source(source: str) -> tuple[SourceTree, dict[str, ObjectInfo]]:
    store = open_store(source)
    objects = {info.key: info for info in store.walk()}
    if not objects:
        raise DataError(f"{source}: no such folder, or nothing in it; --source is the dataset's unpacked folder")
    return SourceTree(source, tuple(objects), store.read), objects


def _check_sizes(refs: list[SampleRef], source: str) -> dict[str, int]:
    """Pixels of every sample, from the files' first bytes: a wrong size shows before anything is written."""
    store = open_store(source)

    def size_of(path: str) -> tuple[int, int]:
        return formats.image_size(store.read_range(path, 0, _HEAD_BYTES), path)

    def check(ref: SampleRef) -> int:
        first = size_of(ref.image0)
        for path in (ref.image1, ref.flow):
            if path is not None and (other := size_of(path)) != first:
                raise DataError(
                    f"{source}: {ref.image0} is {first[1]}x{first[0]} but {path} is {other[1]}x{other[0]} pixels; "
                    "frames and ground truth of a pair must have one size"
                )
        return first[0] * first[1]

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip((ref.key for ref in refs), pool.map(check, refs), strict=True))


def _write_all(plans: list[ShardPlan], source: str, target: str, at_once: int) -> Iterator[tuple[int, ShardEntry]]:
    """Write shards by Ray tasks, at most `at_once` at a time; yields them as they finish."""
    task = ray.remote(num_cpus=1, max_retries=3)(_write_task)
    waiting = list(reversed(plans))
    running: dict[ray.ObjectRef, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                plan = waiting.pop()
                running[task.remote(plan, source, target)] = plan.index
            finished, _ = ray.wait(list(running), num_returns=1)
            result = ray.get(finished[0])
            if isinstance(result, DataError):
                raise result
            yield running.pop(finished[0]), result
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def _write_task(plan: ShardPlan, source: str, target: str) -> ShardEntry | DataError:
    # An error of the user's comes back as a value: Ray would wrap it in a trace, and try a damaged file three times.
    raw = open_store(source)
    try:
        return write_shard(plan, SourceTree(source, (), raw.read), open_store(target))
    except DataError as error:
        return error
