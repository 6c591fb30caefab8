"""An optional cache of stored samples on a machine's own disk, for storage that is slow or charges for requests.

Samples are addressed by their content, so no cached sample is ever stale. All processes and runs of a machine may share
the cache, and it may be deleted at any time.
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

# Each part of the cache has its own lock, so that loader processes seldom wait for each other.
_PARTS = 8

# Space left free for checkpoints, logs and Ray: a twentieth of the disk, but at most 2 GiB.
_SHARE_LEFT_FREE = 20
_LEFT_FREE_BYTES = 2 << 30


@dataclass(frozen=True)
class SampleCache:
    """A folder that holds at most `limit_bytes` of samples; those stored longest ago are evicted first.

    A sample that cannot be kept (the disk is almost full, a lock is held too long) or was damaged (the machine lost
    power) is read from storage again. A SampleCache can be passed to loader processes.
    """

    folder: Path
    limit_bytes: int

    def read(self, shard: ShardEntry, sample: SampleEntry, fetch: Callable[[], bytes]) -> bytes:
        """A sample's tar members, from the cache or else from `fetch`."""
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

    def trouble(self) -> str:
        """Why no sample can be kept now, in a line; empty if it can. Reading goes on without."""
        try:
            self._tables().set("trouble", b"")
            self._tables().delete("trouble")
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            return f"{self.folder}: {' '.join(str(error).split()) or type(error).__name__}"
        return "" if _has_room(self.folder) else f"{self.folder}: its disk is almost full"

    def _kept(self, key: str) -> bytes | None:
        with contextlib.suppress(OSError, sqlite3.Error, diskcache.Timeout):
            data = self._tables().get(key)
            return data if isinstance(data, bytes) else None
        return None

    def _tables(self) -> diskcache.FanoutCache:
        """Opened again if the folder was deleted: in the old tables, no other process would find new samples."""
        kept, table = _opened(self, os.getpid())
        if _table_of(self.folder) != table:
            _opened.cache_clear()
            kept, _ = _opened(self, os.getpid())
        return kept


def _table_of(folder: Path) -> int | None:
    """Inode number of the first part's table. No other file gets this number while a process has the table open."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "000" / "cache.db").stat().st_ino
    return None


def _has_room(folder: Path) -> bool:
    """Whether the disk has space for more. On a full disk, diskcache would leave files that no table lists."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize > min(disk.f_blocks * disk.f_frsize // _SHARE_LEFT_FREE, _LEFT_FREE_BYTES)


@functools.lru_cache(maxsize=4)
def _opened(cache: SampleCache, pid: int) -> tuple[diskcache.FanoutCache, int | None]:
    """The cache as opened by one process, and its `_table_of`: a fork must not share SQLite connections."""
    tables = diskcache.FanoutCache(
        str(cache.folder),
        shards=_PARTS,
        size_limit=cache.limit_bytes,
        cull_limit=2,  # samples evicted for each new one, at most: enough to stay within the limit
        disk=_PlainDisk,
    )
    return tables, _table_of(cache.folder)


class _PlainDisk(diskcache.Disk):
    """Plain bytes only: someone who can write to the folder must not be able to make this process load a pickle."""

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode == diskcache.core.MODE_PICKLE:
            raise OSError(f"{self._directory}: holds something that is no sample")
        return super().fetch(mode, filename, value, read)
