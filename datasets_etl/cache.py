"""An optional cache of stored samples on a machine's own disk, for storage that is slow or charges for requests.

Samples are addressed by their content, so nothing in it is ever stale. All processes and runs of a machine may share
it, and it may be deleted at any time.
"""

import contextlib
import functools
import os
import sqlite3
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache

from datasets_etl.manifest import SampleEntry, ShardEntry

# Each has a lock of its own, so that loader processes seldom wait for each other.
_PARTS = 8

# Of the disk, for checkpoints, logs and Ray: a twentieth, at most 2 GiB.
_SHARE_LEFT_FREE = 20
_LEFT_FREE_BYTES = 2 << 30


@dataclass(frozen=True)
class SampleCache:
    """A folder that holds at most `limit_bytes` of samples; the ones stored longest ago make room for new ones.

    What cannot be kept (a disk about to be full, a lock held too long) or is not what it was (a machine that lost
    power) is read from storage again. Travels to loader processes as it is.
    """

    folder: Path
    limit_bytes: int

    def read(self, shard: ShardEntry, sample: SampleEntry, fetch: Callable[[], bytes]) -> bytes:
        """A sample's tar members: kept ones, or those `fetch` gives."""
        key = f"{shard.sha256}:{sample.offset}:{sample.length}"
        data = self._kept(key)
        if data is not None and zlib.crc32(data) == sample.crc32:
            return data
        data = fetch()
        with contextlib.suppress(OSError, sqlite3.Error, diskcache.Timeout):
            kept = self._tables()
            if _has_room(self.folder):
                kept.set(key, data)
        return data

    def _kept(self, key: str) -> bytes | None:
        with contextlib.suppress(OSError, sqlite3.Error, diskcache.Timeout):
            data = self._tables().get(key)
            return data if isinstance(data, bytes) else None
        return None

    def _tables(self) -> diskcache.FanoutCache:
        """Made anew where the folder was deleted: what is open still would keep samples that no other process finds."""
        kept, table = _opened(self, os.getpid())
        if _table_of(self.folder) != table:
            _opened.cache_clear()
            kept, _ = _opened(self, os.getpid())
        return kept


def _table_of(folder: Path) -> int | None:
    """Which file the first part's table is. Its number is no other file's for as long as a process has it open."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "000" / "cache.db").stat().st_ino
    return None


def _has_room(folder: Path) -> bool:
    """Whether the disk has some left for others. On a full one diskcache would leave files that no table knows of."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize > min(disk.f_blocks * disk.f_frsize // _SHARE_LEFT_FREE, _LEFT_FREE_BYTES)


@functools.lru_cache(maxsize=4)
def _opened(cache: SampleCache, pid: int) -> tuple[diskcache.FanoutCache, int | None]:
    """One a process, with its `_table_of`: SQLite's connections must not be shared with a fork."""
    tables = diskcache.FanoutCache(
        str(cache.folder),
        shards=_PARTS,
        size_limit=cache.limit_bytes,
        cull_limit=2,  # samples that go for each that comes: enough to stay within the bound
        disk=_PlainDisk,
    )
    return tables, _table_of(cache.folder)


class _PlainDisk(diskcache.Disk):
    """Bytes as they are: whoever can write to the folder must not be able to have a pickle opened."""

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode == diskcache.core.MODE_PICKLE:
            raise OSError(f"{self._directory}: holds something that is no sample")
        return super().fetch(mode, filename, value, read)
