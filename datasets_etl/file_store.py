"""A folder as an object store."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from datasets_etl.errors import DataError, NotFoundError
from datasets_etl.objects import ObjectInfo, require_size, whole

_LEFT_BEHIND_S = 24 * 3600


class FileStore:
    """A folder as an object store."""

    def __init__(self, root: Path) -> None:
        try:
            self.root = root.expanduser().absolute()
        except RuntimeError:
            raise DataError(f"{root}: no user of that name; write the folder's whole path") from None
        self.url = self.root.as_uri()

    def read(self, key: str, size: int | None = None) -> bytes:
        with self._errors(key):
            try:
                data = (self.root / key).read_bytes()
            except IsADirectoryError:
                raise NotFoundError(f"{self.root / key}: a folder, no file") from None
        require_size(len(data), f"{self.url}/{key}", size)
        return data

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with self._errors(key), (self.root / key).open("rb") as file:
            data = os.pread(file.fileno(), length, offset)
        return whole(data, f"{self.url}/{key}", offset, length)

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key), self._replacing(key) as file:
            file.write_bytes(data)

    def upload(self, path: Path, key: str) -> None:
        with (
            self._errors(key),
            self._replacing(key) as file,
            path.open("rb") as source,
            file.open("wb") as target,
        ):
            while chunk := source.read(1 << 22):
                target.write(chunk)

    def size(self, key: str) -> int | None:
        with self._errors(key):
            try:
                return (self.root / key).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def delete(self, key: str) -> None:
        with self._errors(key):
            (self.root / key).unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """Remove temporary files that never got their final names. Every chunk written updates a file's mtime: a file
        unchanged for a day has no writer, so the files of other active runs stay.
        """
        with self._errors(""):
            for path in self.root.rglob(".*.part"):
                with contextlib.suppress(FileNotFoundError):  # another run may remove them, too
                    if time.time() - path.stat().st_mtime > _LEFT_BEHIND_S:
                        path.unlink()

    def walk(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = []
        with self._errors(prefix):
            for folder, below, names in os.walk(
                self.root / prefix.rpartition("/")[0], onerror=_raise_unless_gone, followlinks=True
            ):
                below[:] = [name for name in below if not _leads_back(Path(folder, name))]
                relative = Path(folder).relative_to(self.root).as_posix()
                for name in names:
                    key = name if relative == "." else f"{relative}/{name}"
                    if key.startswith(prefix) and not name.endswith(".part"):
                        found.append(key)
        for key in sorted(found):
            with self._errors(key):
                status = self._status(key)
            if status is not None:
                yield ObjectInfo(key, status.st_size, f"{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_size}")

    def _status(self, key: str) -> os.stat_result | None:
        """None for a file that was deleted after it was listed; a dangling link is a DataError."""
        path = self.root / key
        try:
            return path.stat()
        except FileNotFoundError:
            if path.is_symlink():
                raise DataError(f"{path}: a link to {path.readlink()}, which is not there") from None
            return None

    @contextlib.contextmanager
    def _replacing(self, key: str) -> Iterator[Path]:
        """A temporary file next to the final one. It is renamed atomically once it is complete and on disk."""
        final = self.root / key
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.chmod(0o644)
            beside.replace(final)
        finally:
            beside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"{error.filename or self.root / key}: no such file") from None
        except OSError as error:
            raise DataError(f"{self.root / key}: {error.strerror or error}") from error


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it is in, so that following it would never end."""
    return folder.is_symlink() and any(folder.samefile(parent) for parent in folder.parents)


def _raise_unless_gone(error: OSError) -> None:
    """A folder that cannot be listed must not count as empty; a missing folder does."""
    if not isinstance(error, FileNotFoundError):
        raise DataError(f"{error.filename}: {error.strerror}") from error
