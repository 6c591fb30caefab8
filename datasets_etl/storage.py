"""Objects by URL: `file://` (or a plain path) and `s3://`, behind one small interface.

A store is rooted at a URL and addresses objects by keys relative to it. A store object holds no open connection, so it
can be passed to Ray tasks and loader processes.
"""

import contextlib
import functools
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import unquote, urlparse

import boto3
import botocore.exceptions as s3_errors
import botocore.session
import tenacity
from botocore.config import Config
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies
from urllib3.exceptions import HTTPError

from datasets_etl.errors import DamagedError, DataError
from datasets_etl.range_reads import RangeReader

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


READ_TIMEOUT_S = 60
"""How long an S3 server may stay silent before the request is repeated."""

_CONNECT_TIMEOUT_S = 5
_CONNECTIONS = 32
# How long a signed URL is used, and how much longer it stays valid because clocks may differ.
_SIGNATURE_S = 900
_SIGNATURE_LEFT_S = 900
_SIGNATURES = 4096
_LEFT_BEHIND_S = 24 * 3600
# EC2's metadata service, which gives machines their credentials. botocore asks it once, for a second: too little where
# all loader processes of a machine ask at the same time.
_METADATA_SERVICE = {"metadata_service_timeout": 2, "metadata_service_num_attempts": 3}


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

    def read_range(self, key: str, offset: int, length: int) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def upload(self, path: Path, key: str) -> None: ...
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
        return FileStore(Path(unquote(parsed.path)))
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


def file_sha256(path: Path) -> str:
    """The SHA-256 of a local file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            data = (self.root / key).read_bytes()
        _require_size(len(data), f"{self.url}/{key}", size)
        return data

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with self._errors(key), (self.root / key).open("rb") as file:
            data = os.pread(file.fileno(), length, offset)
        return _whole(data, f"{self.url}/{key}", offset, length)

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
            raise DataError(f"{error.filename or self.root / key}: no such file") from None
        except OSError as error:
            raise DataError(f"{self.root / key}: {error.strerror or error}") from error


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it is in, so that following it would never end."""
    return folder.is_symlink() and any(folder.samefile(parent) for parent in folder.parents)


def _raise_unless_gone(error: OSError) -> None:
    """A folder that cannot be listed must not count as empty; a missing folder does."""
    if not isinstance(error, FileNotFoundError):
        raise DataError(f"{error.filename}: {error.strerror}") from error


class _ShortAnswerError(DataError):
    """The answer has the wrong length, but the object need not be damaged: repeating the request may help."""


# Transient errors: the server is away or busy, or an answer broke off on the way.
_PASSING = (
    s3_errors.HTTPClientError,
    s3_errors.ConnectionError,
    s3_errors.IncompleteReadError,
    s3_errors.FlexibleChecksumError,
    s3_errors.CredentialRetrievalError,
    HTTPError,
    ConnectionError,
    _ShortAnswerError,
)
_BUSY = (429, 500, 502, 503, 504)


def may_pass(error: BaseException | None) -> bool:
    """Whether an S3 client's error is transient: the server is away or busy, rather than refusing the request."""
    if isinstance(error, s3_errors.ClientError):
        # A server that no longer knows a multipart upload must be sent all of it again.
        lost = error.response["Error"]["Code"] == "NoSuchUpload"
        return lost or error.response["ResponseMetadata"]["HTTPStatusCode"] in _BUSY
    if isinstance(error, boto3.exceptions.S3UploadFailedError):
        return may_pass(error.__cause__ or error.__context__)
    return isinstance(error, _PASSING)


PATIENCE_VARIABLE = "GMFLOW_STORAGE_PATIENCE_S"
"""Environment variable: seconds for which a failed request is repeated. It is repeated at least once, even if the first
attempt alone took longer. A mistyped endpoint is therefore reported only after this time.
"""


@contextlib.contextmanager
def waiting_for_storage(seconds: float) -> Iterator[None]:
    """In a `with`, this process and those it starts wait `seconds` for storage, unless the variable is already set."""
    before = os.environ.get(PATIENCE_VARIABLE)
    os.environ.setdefault(PATIENCE_VARIABLE, str(seconds))
    try:
        yield
    finally:
        if before is None:
            del os.environ[PATIENCE_VARIABLE]


def _out_of_patience(state: tenacity.RetryCallState) -> bool:
    return (state.seconds_since_start or 0.0) > _patience() and state.attempt_number > 1


def _patience() -> float:
    given = os.environ.get(PATIENCE_VARIABLE, "10")
    try:
        return float(given)
    except ValueError:
        raise DataError(f"{PATIENCE_VARIABLE}={given}: not a number of seconds; set it to one, such as 60") from None


# Every request is idempotent: reads, listings, deletions, and writes of whole objects. botocore's own retries come
# first, but they cover neither bodies that break off nor a server that is away for seconds.
_retry = tenacity.retry(
    retry=tenacity.retry_if_exception(may_pass),
    stop=_out_of_patience,
    wait=tenacity.wait_exponential_jitter(multiplier=0.3, max=10.0),
    reraise=True,
)


class S3Store:
    """A prefix of an S3 bucket. Endpoint, region and credentials come from the usual AWS settings."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def read(self, key: str, size: int | None = None) -> bytes:
        with self._errors(key):
            _s3()  # waits for credentials by itself: within what is tried again, it would wait twice as long
            return self._get(key, size)

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with self._errors(key):
            _s3()
            return self._get_range(key, offset, length)

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            _retry(_s3().put_object)(Bucket=self.bucket, Key=self._key(key), Body=data)

    def upload(self, path: Path, key: str) -> None:
        with self._errors(key):
            _retry(_s3().upload_file)(str(path), self.bucket, self._key(key))

    def size(self, key: str) -> int | None:
        with self._errors(key):
            try:
                return _retry(_s3().head_object)(Bucket=self.bucket, Key=self._key(key))["ContentLength"]
            except s3_errors.ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                    return None
                raise

    def delete(self, key: str) -> None:
        with self._errors(key):
            _retry(_s3().delete_object)(Bucket=self.bucket, Key=self._key(key))

    def remove_leftovers(self) -> None:
        """Nothing to do: the bucket's lifecycle rule removes parts of unfinished uploads (docs/data.md)."""

    def walk(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = self._key("")
        further: dict[str, Any] | None = {}
        while further is not None:
            with self._errors(prefix):
                page = _retry(_s3().list_objects_v2)(Bucket=self.bucket, Prefix=start + prefix, **further)
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # consoles make an empty object to show a folder
                    yield ObjectInfo(entry["Key"][len(start) :], entry["Size"], entry["ETag"].strip('"'))
            further = {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else None

    @_retry
    def _get(self, key: str, size: int | None) -> bytes:
        answer = _s3().get_object(Bucket=self.bucket, Key=self._key(key))
        # Checked before the body is read: a short body also has a wrong checksum, and would count as damaged.
        _require_size(answer.get("ContentLength", size), f"{self.url}/{key}", size)
        return answer["Body"].read()

    @_retry
    def _get_range(self, key: str, offset: int, length: int) -> bytes:
        data = self._get_range_quickly(key, offset, length)
        if data is not None and len(data) == length:
            return data
        span = f"bytes={offset}-{offset + length - 1}"
        answer = _s3().get_object(Bucket=self.bucket, Key=self._key(key), Range=span)
        data = answer["Body"].read()
        url = f"{self.url}/{key}"
        total = answer.get("ContentRange", "").rpartition("/")[2]
        if len(data) != length and total.isdigit() and int(total) >= offset + length:
            raise _ShortAnswerError(_too_short(data, url, offset, length, "answer"))
        return _whole(data, url, offset, length)

    def _get_range_quickly(self, key: str, offset: int, length: int) -> bytes | None:
        """Reads with a signed URL, the same for all samples of a shard. This takes a fifth of the CPU time of
        `get_object`, and training needs the CPU for decoding, too. Returns None for any answer other than the bytes:
        `get_object` then handles the case.
        """
        reader = _range_reader(os.getpid())
        if reader is None:
            return None
        url = _signed_url(self.bucket, self._key(key), int(time.monotonic() // _SIGNATURE_S))
        return reader.read(url, offset, length)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        url = f"{self.url}/{key}"
        try:
            yield
        except s3_errors.NoCredentialsError:
            raise DataError(f"{url}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except s3_errors.CredentialRetrievalError as error:
            raise DataError(f"{url}: no credentials from where they come from here: {error}") from None
        except (s3_errors.PartialCredentialsError, s3_errors.ProfileNotFound) as error:
            raise DataError(f"{url}: {error}; correct AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret") from None
        except s3_errors.FlexibleChecksumError as error:
            raise DamagedError(f"{url}: damaged: its checksum is not the one stored with it") from error
        except s3_errors.ClientError as error:
            raise DataError(f"{url}: {_explain(error, self.bucket)}") from error
        except (s3_errors.BotoCoreError, boto3.exceptions.Boto3Error, HTTPError, ConnectionError) as error:
            raise DataError(f"{url}: {error}; is the object store up, is AWS_ENDPOINT_URL right?") from error


def _explain(error: s3_errors.ClientError, bucket: str) -> str:
    code = error.response["Error"]["Code"]
    if code in ("NoSuchKey", "404"):
        return "no such object"
    if code == "NoSuchBucket":
        return f"no bucket {bucket}; create it or correct the URL"
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return "access denied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
    return str(error)


def _whole(data: bytes, url: str, offset: int, length: int) -> bytes:
    if len(data) != length:
        raise DamagedError(_too_short(data, url, offset, length, "object"))
    return data


def _require_size(found: int | None, url: str, listed: int | None) -> None:
    if listed not in (None, found):
        raise _ShortAnswerError(f"{url}: {found} bytes instead of {listed} as listed; did it change? Run again")


def _too_short(data: bytes, url: str, offset: int, length: int, what: str) -> str:
    return f"{url}: {len(data)} bytes at offset {offset} instead of {length}; the {what} is cut short"


@functools.lru_cache(maxsize=_SIGNATURES)
def _signed_url(bucket: str, key: str, period: int) -> str:
    """The URL for reading an object in this `period` of `_SIGNATURE_S` seconds."""
    place = {"Bucket": bucket, "Key": key}
    return _s3().generate_presigned_url("get_object", Params=place, ExpiresIn=_SIGNATURE_S + _SIGNATURE_LEFT_S)


@functools.lru_cache(maxsize=1)
def _range_reader(pid: int) -> RangeReader | None:
    """The reader trusts the certificates that botocore trusts. None if proxies are set, which only botocore handles."""
    if get_environ_proxies(_s3().meta.endpoint_url):
        return None
    bundle = botocore.session.get_session().get_config_variable("ca_bundle")
    return RangeReader(get_cert_path(bundle or True), _CONNECT_TIMEOUT_S, READ_TIMEOUT_S)


def _s3() -> "S3Client":
    return _s3_of_process(os.getpid())


def _addressing_style(settings: botocore.session.Session) -> Literal["path", "virtual"] | None:
    """Where an object's bucket stands in its URL; None to leave it to the user's profile, if that says anything of S3.

    Servers other than AWS seldom have a DNS name for every bucket. For AWS, botocore would by default sign URLs of the
    host of all regions, which knows only the older ones.
    """
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        return "path"
    return None if {"endpoint_url", "services", "s3"} & settings.get_scoped_config().keys() else "virtual"


@functools.lru_cache(maxsize=1)
@_retry
def _s3_of_process(pid: int) -> "S3Client":
    """One client per process: a fork must not share sockets."""
    _patience()  # report a wrong value now, not in the middle of training when storage is away
    settings = botocore.session.get_session()
    style = _addressing_style(settings)
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": 3},
        # botocore would sign URLs with version 2 in some regions, which encrypted objects and newer servers refuse.
        signature_version="s3v4",
        s3=None if style is None else {"addressing_style": style},
    )
    for name, least in _METADATA_SERVICE.items():
        settings.set_config_variable(name, max(least, settings.get_config_variable(name)))
    session = boto3.session.Session(botocore_session=settings)
    if session.get_credentials() is None:
        raise s3_errors.NoCredentialsError  # now, because a client made without credentials would never get any
    try:
        return session.client("s3", config=config)
    except ValueError as error:
        raise DataError(f"{error}; AWS_ENDPOINT_URL begins with http:// or https://") from None
