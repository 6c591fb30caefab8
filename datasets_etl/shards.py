"""Plan shards (pure functions), and write one of them."""

import contextlib
import hashlib
import json
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from webdataset import TarWriter

from datasets_etl.errors import DamagedError, DataError
from datasets_etl.manifest import FORMAT_VERSION, SampleEntry, ShardEntry
from datasets_etl.objects import ObjectStore, file_sha256
from datasets_etl.samples import SCHEMA_VERSION, SampleFacts, encode_sample
from datasets_etl.sources import SampleRef, SourceTree


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write.

    Attributes:
        dataset: the dataset's name.
        index: the shard's number.
        refs: its samples in order.
        fingerprint: changes when a raw file or the format changes; the name of the finished shard's record contains it.
    """

    dataset: str
    index: int
    refs: tuple[SampleRef, ...]
    fingerprint: str

    @property
    def record_name(self) -> str:
        """Name of the object that records the finished shard, so that a second run need not write it again."""
        return f"records/{self.index:05d}-{self.fingerprint}.json"


@dataclass(frozen=True)
class WrittenShard:
    """The result of a plan: the shard (None if every pair is damaged), and the reason for each omitted pair, by key."""

    entry: ShardEntry | None
    quarantined: Mapping[str, str]


def plan_shards(
    refs: Sequence[SampleRef], pixels: Mapping[str, int], stamps: Mapping[str, str], shard_bytes: int
) -> list[ShardPlan]:
    """Divide samples, in order, into shards of about `shard_bytes` of raw pixels and flow.

    Args:
        refs: all samples of a dataset.
        pixels: number of pixels of a frame, by sample key.
        stamps: a value that changes when a raw file changes, by the file's path.
        shard_bytes: raw bytes after which the next shard begins; a shard has at least one sample.
    """
    groups: list[list[SampleRef]] = []
    filled = shard_bytes
    for ref in refs:
        if filled >= shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(ref)
        filled += pixels[ref.key] * (2 * 3 + 2 * 4)  # two RGB frames and a float32 flow
    return [
        ShardPlan(refs[0].dataset, index, tuple(group), _fingerprint(group, stamps))
        for index, group in enumerate(groups)
    ]


def raw_files(ref: SampleRef) -> list[str]:
    """Paths of the raw files that go into a sample."""
    paths = (ref.image0, ref.image1, ref.flow, ref.flow_noc, ref.occlusion, ref.invalid)
    return [path for path in paths if path is not None]


def _fingerprint(refs: Sequence[SampleRef], stamps: Mapping[str, str]) -> str:
    content = [
        FORMAT_VERSION,
        SCHEMA_VERSION,
        [(asdict(r), [stamps[path] for path in raw_files(r)]) for r in refs],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def finished_shard(plan: ShardPlan, store: ObjectStore) -> WrittenShard | None:
    """What an earlier run wrote; None if the record is missing or not ours, or the shard is gone or of another size."""
    if store.size(plan.record_name) is None:
        return None
    try:
        record = json.loads(store.read(plan.record_name))
        entry, quarantined = ShardEntry.from_dict(record["shard"]), dict(record["quarantined"])
    except (ValueError, KeyError, TypeError):
        return None
    return WrittenShard(entry, quarantined) if store.size(entry.name) == entry.bytes else None


def write_shard(plan: ShardPlan, tree: SourceTree, store: ObjectStore, *, strict: bool = False) -> WrittenShard:
    """Encode a shard's samples, upload the tar under a name with its hash, then write the record that it is finished.

    A damaged pair is left out; with `strict`, it raises DamagedError and nothing is written. If all pairs are damaged,
    nothing is written either. Raises DataError if storage does, or if the temporary folder is full.
    """
    with _naming_temporary_folder(), _temporary_file() as path:
        facts, quarantined = _write_tar(plan, tree, path, strict)
        if not facts:
            return WrittenShard(None, quarantined)
        digest = file_sha256(path)
        entry = ShardEntry(
            name=f"shards/{plan.dataset}-{plan.index:05d}-{digest[:16]}.tar",
            bytes=path.stat().st_size,
            sha256=digest,
            samples=_entries(path, facts),
        )
        if store.size(entry.name) != entry.bytes:
            store.upload(path, entry.name)
    record = {"shard": asdict(entry), "quarantined": quarantined}
    store.write(plan.record_name, json.dumps(record, sort_keys=True).encode())
    return WrittenShard(entry, quarantined)


@contextlib.contextmanager
def _temporary_file() -> Iterator[Path]:
    """On Linux the file has no name in its folder, but can be opened through /proc: a killed worker leaves no file."""
    nameless = sys.platform == "linux"
    with tempfile.TemporaryFile() if nameless else tempfile.NamedTemporaryFile(prefix="gmflow-shard-") as file:
        yield Path(f"/proc/self/fd/{file.fileno()}" if nameless else file.name)


@contextlib.contextmanager
def _naming_temporary_folder() -> Iterator[None]:
    """Turns an OSError into a DataError. Stores raise DataError, so an OSError comes from the temporary folder."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{tempfile.gettempdir()}: {error.strerror or error}; a shard is written there first: set TMPDIR to a "
            "folder with more room where Ray runs, or give a smaller --shard-mib"
        ) from error


def _write_tar(
    plan: ShardPlan, tree: SourceTree, path: Path, strict: bool
) -> tuple[list[tuple[SampleRef, SampleFacts]], dict[str, str]]:
    facts = []
    quarantined = {}
    # With a fixed owner, mode and mtime, the same samples give the same bytes.
    with (
        path.open("wb") as file,
        TarWriter(file, user="gmflow", group="gmflow", mode=0o644, mtime=0) as writer,
    ):
        for ref in plan.refs:
            try:
                sample, sample_facts = encode_sample(ref, tree)
            except DamagedError as error:
                if strict:
                    raise
                quarantined[ref.key] = str(error)
            else:
                writer.write(sample)
                facts.append((ref, sample_facts))
    return facts, quarantined


def _entries(path: Path, facts: Sequence[tuple[SampleRef, SampleFacts]]) -> tuple[SampleEntry, ...]:
    spans: dict[str, tuple[int, int]] = {}
    with tarfile.open(path, mode="r:") as tar:
        for member in tar:
            key = member.name.partition(".")[0]
            end = member.offset_data + (member.size + tarfile.BLOCKSIZE - 1) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            spans[key] = (spans.get(key, (member.offset, 0))[0], end)
    entries = []
    with path.open("rb") as file:
        for ref, fact in facts:
            start, end = spans[ref.key]
            file.seek(start)
            crc32 = zlib.crc32(file.read(end - start))
            entries.append(
                SampleEntry(
                    key=ref.key,
                    subset=ref.subset,
                    offset=start,
                    length=end - start,
                    crc32=crc32,
                    **asdict(fact),
                )
            )
    return tuple(entries)


def read_sample_bytes(store: ObjectStore, shard: ShardEntry, sample: SampleEntry) -> bytes:
    """One sample's tar members, by one ranged read; by a second one if the first was damaged on its way.

    Raises DamagedError if they are not what was written.
    """
    for _ in range(2):
        data = store.read_range(shard.name, sample.offset, sample.length)
        if zlib.crc32(data) == sample.crc32:
            return data
    raise DamagedError(
        f"{store.url}/{shard.name}: sample {sample.key} at byte {sample.offset} is damaged (checksum differs); "
        "delete this shard and run pipelines/etl.py again, it writes what is missing"
    )
