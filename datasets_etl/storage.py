"""Objects by URL: `file://` (or a plain path) and `s3://`, behind one small interface.

A store is rooted at a URL and addresses objects by keys relative to it. A store object holds no open connection, so it
can be passed to Ray tasks and loader processes.
"""

from pathlib import Path
from urllib.parse import unquote, urlparse

from datasets_etl.errors import DataError
from datasets_etl.file_store import FileStore
from datasets_etl.objects import ObjectStore
from datasets_etl.s3_store import S3Store


def open_store(url: str) -> ObjectStore:
    """The store rooted at a `file://` or `s3://` URL or a local path. Raises DataError for any other scheme."""
    try:
        parsed = urlparse(url)
    except ValueError as error:  # such as brackets in the place of a host
        raise DataError(f"{url}: neither a URL nor a path ({error})") from None
    if parsed.scheme in ("s3", "file") and {"?", "#"} & set(url):
        raise DataError(f"{url}: a place has no ? or # in it; choose a name without, or in file:// write %3F or %23")
    if parsed.scheme == "s3":
        if not parsed.netloc:
            raise DataError(f"{url}: no bucket in this URL; write s3://BUCKET/PREFIX")
        return S3Store(parsed.netloc, parsed.path.strip("/"))
    if parsed.scheme == "file":
        if parsed.netloc not in ("", "localhost"):
            raise DataError(f"{url}: a file URL has three slashes; write file:///{parsed.netloc}{parsed.path}")
        return FileStore(Path(unquote(parsed.path) or "/"))
    if parsed.scheme == "":
        return FileStore(Path(url))
    raise DataError(f"{url}: storage is file:// or s3://, not {parsed.scheme}://")


def split_url(url: str) -> tuple[ObjectStore, str]:
    """The store an object lies in and its key: `s3://b/a/manifest.json` → (store of s3://b/a, "manifest.json")."""
    parent, _, key = url.rstrip("/").rpartition("/")
    if not key:
        raise DataError(f"{url}: names no object")
    if not parent and not url.startswith("/"):
        parent = "."
    return open_store(parent or "/"), unquote(key) if url.startswith("file:") else key
