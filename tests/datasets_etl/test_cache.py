"""The cache of stored samples: the same samples, bounded, shared, never a reason to stop."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diskcache
import pytest

from datasets_etl.cache import SampleCache
from datasets_etl.loader import MixturePart, PositionDataset
from datasets_etl.manifest import Manifest, SampleEntry, ShardEntry
from tests.datasets_etl.test_loader import AUGMENTATION, same
from tests.waiting import wait_until

SHARD = ShardEntry(name="s.tar", bytes=0, sha256="a" * 64, samples=())


def content(number: int, size: int = 40_000) -> bytes:
    return bytes([number % 256]) * size


def entry(number: int, size: int = 40_000) -> SampleEntry:
    data = content(number, size)
    return SampleEntry(f"{number}", "train", number * 512, len(data), zlib.crc32(data), 10, 10, invalid_pixels=0)


def fetched(asked: list[int], number: int, size: int = 40_000) -> Callable[[], bytes]:
    def fetch() -> bytes:
        asked.append(number)
        return content(number, size)

    return fetch


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_was_read_once_is_not_asked_of_storage_again(tmp_path: Path):
    asked: list[int] = []
    cache = SampleCache(tmp_path, 10 << 20)
    for _ in range(3):
        for number in range(5):
            assert cache.read(SHARD, entry(number), fetched(asked, number)) == content(number)
    assert asked == [0, 1, 2, 3, 4]


def test_it_stays_within_its_bound(tmp_path: Path):
    asked: list[int] = []
    limit = 32 << 20
    cache = SampleCache(tmp_path, limit)
    for number in range(200):  # 160 MB
        cache.read(SHARD, entry(number, 800_000), fetched(asked, number, 800_000))
    assert size_of(tmp_path) < 1.3 * limit  # its tables and what was just stored come on top
    newest = len(asked)
    cache.read(SHARD, entry(199, 800_000), fetched(asked, 199, 800_000))
    assert len(asked) == newest


def test_what_is_not_what_it_was_is_read_again_and_kept_anew(tmp_path: Path):
    asked: list[int] = []
    cache = SampleCache(tmp_path, 10 << 20)
    cache.read(SHARD, entry(1), fetched(asked, 1))
    (kept,) = tmp_path.rglob("*.val")
    kept.write_bytes(content(2))
    for _ in range(2):
        assert cache.read(SHARD, entry(1), fetched(asked, 1)) == content(1)
    assert asked == [1, 1]
    for kept in tmp_path.rglob("*.val"):
        kept.unlink()
    assert cache.read(SHARD, entry(1), fetched(asked, 1)) == content(1)


def test_a_folder_that_takes_nothing_is_no_reason_to_stop(tmp_path: Path):
    (tmp_path / "file").write_text("")
    asked: list[int] = []
    cache = SampleCache(tmp_path / "file" / "below", 10 << 20)
    for _ in range(2):
        assert cache.read(SHARD, entry(1), fetched(asked, 1)) == content(1)
    assert asked == [1, 1]
    assert f"{cache.folder}: " in cache.trouble()
    assert SampleCache(tmp_path / "elsewhere", 10 << 20).trouble() == ""


@pytest.mark.parametrize("by_another", [False, True])
def test_a_folder_that_was_deleted_comes_back(tmp_path: Path, by_another: bool):
    asked: list[int] = []
    cache = SampleCache(tmp_path / "cache", 10 << 20)
    cache.read(SHARD, entry(1), fetched(asked, 1))
    shutil.rmtree(tmp_path / "cache")
    if by_another:  # a process that noticed first
        diskcache.FanoutCache(str(tmp_path / "cache"), shards=8).close()
    for _ in range(2):
        assert cache.read(SHARD, entry(1), fetched(asked, 1)) == content(1)
    assert asked == [1, 1]
    kept = diskcache.FanoutCache(str(tmp_path / "cache"), shards=8)
    assert len(kept) == kept_samples(tmp_path / "cache") == 1
    kept.close()


def test_a_disk_smaller_than_the_bound_is_not_filled(small_disk):
    """On a full one every further sample would leave a file that nothing counts, and checkpoints had no room."""
    folder = small_disk(12)
    cache = SampleCache(folder, 1 << 30)
    for number in range(400):
        assert cache.read(SHARD, entry(number), lambda n=number: content(n)) == content(number)
    assert shutil.disk_usage(folder).free > 400_000
    assert cache.trouble() == f"{folder}: its disk is almost full"
    tables = sqlite3.connect(":memory:")
    known = 0
    for part in folder.glob("0*/cache.db"):
        tables.execute(f"ATTACH '{part}' AS part")
        known += tables.execute("SELECT count(*) FROM part.Cache").fetchone()[0]
        tables.execute("DETACH part")
    assert kept_samples(folder) == known > 50


def test_no_pickle_in_the_folder_is_opened(tmp_path: Path):
    cache = SampleCache(tmp_path, 10 << 20)
    cache.read(SHARD, entry(1), lambda: content(1))
    foreign = diskcache.FanoutCache(str(tmp_path), shards=8)
    foreign.set(f"{SHARD.sha256}:{entry(1).offset}:{entry(1).length}", _Touch(tmp_path / "touched"))
    foreign.close()
    assert cache.read(SHARD, entry(1), lambda: content(1)) == content(1)
    assert not (tmp_path / "touched").exists()


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path(self.path).touch, ())


def _keep_reading(folder: Path) -> None:
    cache = SampleCache(folder, 16 << 20)
    for number in range(1_000_000):
        assert cache.read(SHARD, entry(number % 97), lambda n=number: content(n % 97)) == content(number % 97)


def kept_samples(folder: Path) -> int:
    """How many there are; folders come and go meanwhile, which `rglob` would raise."""
    return sum(name.endswith(".val") for _, _, names in os.walk(folder) for name in names)


def test_processes_share_it_and_a_kill_leaves_it_whole(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_keep_reading, args=(tmp_path,)) for _ in range(3)]
    try:
        for process in processes:
            process.start()
        wait_until(lambda: kept_samples(tmp_path) >= 10)
        time.sleep(1)
        assert all(process.is_alive() for process in processes)
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    for part in tmp_path.glob("0*/cache.db"):
        assert sqlite3.connect(part).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    asked: list[int] = []
    cache = SampleCache(tmp_path, 16 << 20)
    for number in range(97):
        assert cache.read(SHARD, entry(number), fetched(asked, number)) == content(number)
    assert len(asked) < 97


@pytest.mark.usefixtures("s3")
def test_training_goes_on_from_the_cache_where_storage_is_gone(sharded_chairs, tmp_path: Path):
    shutil.copytree(Path(sharded_chairs.manifest_url.removeprefix("file://")).parent, tmp_path / "shards")
    manifest = Manifest.load(str(next((tmp_path / "shards").glob("manifest-*.json"))))
    part = MixturePart(manifest, "train", 1, AUGMENTATION)
    plain = PositionDataset([part], seed=1)
    cached = PositionDataset([part], seed=1, cache=SampleCache(tmp_path / "cache", 100 << 20))
    epoch = range(plain.order.epoch_length)
    expected = [plain[position] for position in epoch]
    assert all(same(cached[position], expected[position]) for position in epoch)
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.unlink()
    assert all(same(cached[position], expected[position]) for position in epoch)


def test_samples_at_one_place_of_two_shards_are_both_kept(tmp_path: Path):
    asked: list[int] = []
    cache = SampleCache(tmp_path, 10 << 20)
    other = replace(SHARD, sha256="b" * 64)
    second = replace(entry(2), offset=entry(1).offset)
    for _ in range(2):
        assert cache.read(SHARD, entry(1), fetched(asked, 1)) == content(1)
        assert cache.read(other, second, fetched(asked, 2)) == content(2)
    assert asked == [1, 2]


def test_a_broken_table_is_no_reason_to_stop(tmp_path: Path):
    for part in range(8):
        (tmp_path / f"{part:03d}").mkdir()
        (tmp_path / f"{part:03d}/cache.db").write_bytes(b"no table" * 1000)
    assert SampleCache(tmp_path, 10 << 20).read(SHARD, entry(1), lambda: content(1)) == content(1)


def test_a_table_that_breaks_meanwhile_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def breaks(*_: object, **__: object) -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    cache = SampleCache(tmp_path, 10 << 20)
    monkeypatch.setattr(diskcache.FanoutCache, "set", breaks)
    assert cache.read(SHARD, entry(1), lambda: content(1)) == content(1)
