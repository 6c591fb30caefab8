"""Turn a raw dataset into shards and a manifest with Ray tasks: index, plan, write, publish."""

import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import ray

from datasets_etl import formats
from datasets_etl.errors import DamagedError, DataError
from datasets_etl.file_store import FileStore
from datasets_etl.manifest import build
from datasets_etl.objects import ObjectInfo, ObjectStore
from datasets_etl.samples import check_size
from datasets_etl.shards import ShardPlan, WrittenShard, finished_shard, plan_shards, raw_files, write_shard
from datasets_etl.sources import SOURCES, SampleRef, Source, SourceTree
from datasets_etl.storage import open_store

DEFAULT_SHARD_BYTES = 512 * 2**20

_HEADERS_AT_ONCE = 16
_FINISH_TIMEOUT_S = 60
_WAITING_TASKS = 4

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ShardTask:
    """What a node needs to write one shard.

    Attributes:
        plan: the shard.
        source, target: URLs of the raw dataset and of the sharded one.
        sizes: bytes of each raw file of the shard by its path, as the source listed them.
        strict: whether a damaged pair is an error; otherwise it is left out.
    """

    plan: ShardPlan
    source: str
    target: str
    sizes: Mapping[str, int]
    strict: bool


@dataclass(frozen=True)
class EtlResult:
    """The result of a run.

    Attributes:
        manifest_url: the published manifest.
        subsets: number of samples of each subset.
        shards: number of shards, `reused` of them from an earlier run.
        raw_bytes: size of the raw files in the shards.
        stored_bytes: size of all shards.
        invalid_pixels: pixels without usable ground truth.
        quarantined: damaged pairs that were left out: sample key → the reason, in one line.
    """

    manifest_url: str
    subsets: dict[str, int]
    shards: int
    reused: int
    raw_bytes: int
    stored_bytes: int
    invalid_pixels: int
    quarantined: Mapping[str, str] = field(default_factory=dict)


def run_etl(
    dataset: str,
    source: str,
    target: str,
    *,
    workers: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    strict: bool = False,
    index: Source | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EtlResult:
    """Shard one dataset. Ray must be connected.

    Args:
        dataset: a key of `SOURCES`; with an `index`, perhaps the name of a dataset of one's own.
        source: `file://` or `s3://` URL or path of the raw dataset in its official layout.
        target: URL or path; the dataset goes to `target/dataset/`.
        workers: number of shards written at a time; None: one for each CPU of the cluster.
        shard_bytes: about how many raw bytes of pixels and flow go into a shard. A shard lies in a temporary folder
            while it is written.
        strict: whether a damaged pair stops the run. Otherwise it is left out, and the manifest says why.
        index: lists the pairs instead of `SOURCES[dataset]`, for example `chairs.index_by_hash` or `listed.index`.
        on_progress: called with the number of samples done and the number of all samples.

    Raises:
        DataError: the source is missing, empty or of another layout; files of a pair differ in size; all pairs of a
            subset are damaged; one pair is damaged and the run is strict; or not all nodes can see the target. Then no
            manifest is written, but finished shards stay, and the same call continues from them.
    """
    store = open_store(f"{target.rstrip('/')}/{dataset}")
    next(store.walk("manifest"), None)  # a bucket that is not there is found before anything is read
    tree, objects = _open_source(source)
    refs = (index or SOURCES[dataset])(tree)
    pixels, damaged = _check_sizes(refs, source, objects, strict)
    _require_some_of_each(refs, damaged, source)
    # Damaged pairs are planned too: once they are repaired, only their own shards are written again.
    plans = plan_shards(refs, pixels, {key: info.stamp for key, info in objects.items()}, shard_bytes)
    store.remove_leftovers()
    shards = {plan.index: shard for plan in plans if (shard := finished_shard(plan, store)) is not None}
    if strict:
        _refuse_quarantined(shards.values(), source)
    reused = len(shards)
    done = sum(len(plans[number].refs) for number in shards)
    on_progress(done, len(refs))

    place = open_store(source).url  # a relative path is this process's own
    tasks = [
        ShardTask(
            plan,
            source=place,
            target=store.url,
            sizes={path: objects[path].size for ref in plan.refs for path in raw_files(ref)},
            strict=strict,
        )
        for plan in plans
        if plan.index not in shards
    ]
    for task, shard in run_tasks(_write_task, tasks, workers):
        shards[task.plan.index] = shard
        done += len(task.plan.refs)
        on_progress(done, len(refs))
    _require_within_reach(store, [shards[task.plan.index] for task in tasks])

    quarantined = {key: why for plan in plans for key, why in shards[plan.index].quarantined.items()}
    _require_some_of_each(refs, quarantined, source)
    entries = [entry for plan in plans if (entry := shards[plan.index].entry) is not None]
    manifest = build(dataset, entries, quarantined)
    raw = {path for ref in refs if ref.key not in quarantined for path in raw_files(ref)}
    return EtlResult(
        manifest_url=manifest.publish(store),
        subsets=manifest.subsets,
        shards=len(manifest.shards),
        reused=reused,
        raw_bytes=sum(objects[path].size for path in raw),
        stored_bytes=sum(shard.bytes for shard in manifest.shards),
        invalid_pixels=sum(sample.invalid_pixels or 0 for sample in manifest.samples),
        quarantined=quarantined,
    )


def run_tasks(
    work: Callable[[_Task], _Result | DataError], tasks: Sequence[_Task], at_once: int | None
) -> Iterator[tuple[_Task, _Result]]:
    """Run `work(task)` for every task with Ray, on one CPU each; yield (task, result) as the tasks finish.

    Args:
        work: returns a DataError instead of raising it, because Ray would wrap it in an error with a stack trace. The
            DataError is raised here.
        tasks: the argument of each call.
        at_once: number of tasks that run at a time; None: one for each CPU of the cluster. Then some more tasks are
            submitted and wait, which makes a cluster grow if it can.
    """
    remote = ray.remote(num_cpus=1, max_retries=3)(work)
    waiting = list(reversed(tasks))
    running: dict[ray.ObjectRef[_Result | DataError], _Task] = {}
    try:
        while waiting or running:
            most = at_once or _submitted_at_once()
            while waiting and len(running) < most:
                task = waiting.pop()
                running[remote.remote(task)] = task
            finished, _ = ray.wait(list(running), num_returns=1)
            result = ray.get(finished[0])
            if isinstance(result, DataError):
                raise result
            yield running.pop(finished[0]), result
    finally:
        if running:  # a task that can finish need not be repeated, and leaves nothing half-written
            _, late = ray.wait(list(running), num_returns=len(running), timeout=_FINISH_TIMEOUT_S)
            for reference in late:
                ray.cancel(reference, force=False)


def _submitted_at_once() -> int:
    cpus = int(ray.cluster_resources().get("CPU", 0))
    return cpus + max(_WAITING_TASKS, cpus // 2)


def _open_source(source: str) -> tuple[SourceTree, dict[str, ObjectInfo]]:
    store = open_store(source)
    objects = {info.key: info for info in store.walk()}
    if not objects:
        raise DataError(f"{source}: no such folder, or nothing in it; --source is the dataset's unpacked folder")
    return SourceTree(source, tuple(objects), store.read), objects


def _check_sizes(
    refs: Sequence[SampleRef], source: str, objects: Mapping[str, ObjectInfo], strict: bool
) -> tuple[dict[str, int], dict[str, str]]:
    """Check the sizes in the files' first bytes, so that wrong sizes are reported before anything is written.

    Returns:
        Number of pixels of a frame by sample key, and the reason by key of each damaged sample (a file's size cannot be
        read). A damaged sample counts as many pixels as the sample before it.

    Raises:
        DataError: files of one pair differ in size, or a sample is damaged and `strict` is set.
    """
    store = open_store(source)

    def size_of(path: str) -> tuple[int, int] | DamagedError:
        length = min(formats.HEAD_BYTES, objects[path].size)
        try:
            return formats.image_size(store.read_range(path, 0, length) if length else b"", path)
        except DamagedError as error:
            return error

    paths = list(dict.fromkeys(path for ref in refs for path in raw_files(ref)))
    with ThreadPoolExecutor(max_workers=_HEADERS_AT_ONCE) as pool:
        sizes = dict(zip(paths, pool.map(size_of, paths), strict=True))

    pixels: dict[str, int] = {}
    quarantined: dict[str, str] = {}
    for ref in refs:
        try:
            height, width = _common_size(ref, sizes)
            pixels[ref.key] = height * width
        except DamagedError as error:
            if strict:
                raise _stopped(source, ref.key, str(error)) from None
            quarantined[ref.key] = str(error)
        except DataError as error:
            raise DataError(f"{source}: {error}") from None
    usual = next(iter(pixels.values()), 1)
    for ref in refs:
        usual = pixels.setdefault(ref.key, usual)
    return pixels, quarantined


def _common_size(ref: SampleRef, sizes: Mapping[str, tuple[int, int] | DamagedError]) -> tuple[int, int]:
    found = []
    for path in raw_files(ref):
        size = sizes[path]
        if isinstance(size, DamagedError):
            raise size
        found.append(size)
        check_size(ref.image0, found[0], path, size)
    return found[0]


def _require_some_of_each(refs: Sequence[SampleRef], quarantined: Mapping[str, str], source: str) -> None:
    """Raises DataError if all pairs of a subset are damaged: such a dataset is not worth a manifest."""
    left = Counter(ref.subset for ref in refs if ref.key not in quarantined)
    for ref in refs:
        if not left[ref.subset]:
            raise DataError(f"{source}: every pair of {ref.subset} is damaged, the first: {quarantined[ref.key]}")


def _require_within_reach(store: ObjectStore, shards: Iterable[WrittenShard]) -> None:
    """Raises DataError for a shard that only the node that wrote it can see: other nodes could not train from it."""
    for shard in shards:
        if shard.entry is not None and store.size(shard.entry.name) != shard.entry.bytes:
            raise DataError(
                f"{store.url}/{shard.entry.name}: written by another node, and not visible from here: "
                "--target must be storage that all nodes share, such as s3://BUCKET/PREFIX"
            )


def _refuse_quarantined(shards: Iterable[WrittenShard], source: str) -> None:
    """Raises DataError for a pair that an earlier run without `strict` left out."""
    for shard in shards:
        for key, reason in shard.quarantined.items():
            raise _stopped(source, key, reason)


def _stopped(source: str, key: str, reason: str) -> DataError:
    return DataError(f"{source}: {key}: {reason} (without --strict the pair is left out)")


def _write_task(task: ShardTask) -> WrittenShard | DataError:
    raw = open_store(task.source)
    if isinstance(raw, FileStore) and not raw.root.is_dir():
        return DataError(
            f"{task.source}: no such folder on node {socket.gethostname()}: --source must be storage that all nodes "
            "reach, such as s3://BUCKET/PREFIX"
        )

    def read(path: str) -> bytes:
        try:
            return raw.read(path, task.sizes[path])
        except DamagedError as error:  # from storage, with a URL that the manifest must not depend on
            raise DamagedError(str(error).removeprefix(f"{raw.url}/")) from None

    try:
        tree = SourceTree(task.source, (), read)
        return write_shard(task.plan, tree, open_store(task.target), strict=task.strict)
    except DamagedError as error:
        return _stopped(task.source, f"shard {task.plan.index}", str(error))
    except DataError as error:
        return error
