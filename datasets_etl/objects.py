"""Objects by URL: what all stores have in common, and what is checked of what they answer."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from datasets_etl.errors import DamagedError, StorageOutageError


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object. `stamp` changes when the content does: it is the ETag, or the size, mtime and ctime of a file.
    Programs that unpack or copy files may set mtime back, but never ctime.
    """

    key: str
    size: int
    stamp: str


class ObjectStore(Protocol):
    """What the pipeline needs from storage. Every write is atomic: an object is complete or absent."""

    url: str

    def read(self, key: str, size: int | None = None) -> bytes:
        """The whole object. Raises DataError if `size` (as listed) is given and the object has another size."""
        ...

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on. Raises DamagedError if the object ends before."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Make an object, in the place of one that has the key."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """`write` of a local file's content, which need not fit into memory."""
        ...

    def size(self, key: str) -> int | None:
        """Size in bytes, None if the object does not exist."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; it is no error if the object does not exist."""
        ...

    def remove_leftovers(self) -> None:
        """Remove what killed writers left behind, if the storage does not do so itself."""
        ...

    def walk(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, sorted by key."""
        ...


def file_sha256(path: Path) -> str:
    """The SHA-256 of a local file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShortAnswerError(StorageOutageError):
    """The answer has the wrong length, but the object need not be damaged: repeating the request may help."""


def whole(data: bytes, url: str, offset: int, length: int) -> bytes:
    """A range that was read. Raises DamagedError if it is shorter than asked for."""
    if len(data) != length:
        raise DamagedError(too_short(data, url, offset, length, "object"))
    return data


def require_size(found: int | None, url: str, listed: int | None) -> None:
    """Raises ShortAnswerError if an object was listed with another size; None: unknown."""
    if listed not in (None, found):
        raise ShortAnswerError(f"{url}: {found} bytes instead of {listed} as listed; did it change? Run again")


def too_short(data: bytes, url: str, offset: int, length: int, what: str) -> str:
    """What to say of a range that is shorter than asked for."""
    return f"{url}: {len(data)} bytes at offset {offset} instead of {length}; the {what} is cut short"
