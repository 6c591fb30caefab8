"""A prefix of an S3 bucket as an object store."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions as s3_errors
from urllib3.exceptions import HTTPError

from datasets_etl.errors import DamagedError, DataError, NotFoundError, StorageOutageError
from datasets_etl.objects import ObjectInfo, ShortAnswerError, require_size, too_short, whole
from datasets_etl.s3_client import read_range_quickly, s3_client
from datasets_etl.storage_retries import may_pass, retry

_FAILURES = (
    s3_errors.ClientError,
    s3_errors.BotoCoreError,
    boto3.exceptions.Boto3Error,
    HTTPError,
    ConnectionError,
)


class S3Store:
    """A prefix of an S3 bucket. Endpoint, region and credentials come from the usual AWS settings."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def read(self, key: str, size: int | None = None) -> bytes:
        with self._errors(key):
            s3_client()  # waits for credentials by itself: within what is tried again, it would wait twice as long
            return self._get(key, size)

    def read_range(self, key: str, offset: int, length: int) -> bytes:
        with self._errors(key):
            s3_client()
            return self._get_range(key, offset, length)

    def write(self, key: str, data: bytes) -> None:
        with self._errors(key):
            retry(s3_client().put_object)(Bucket=self.bucket, Key=self._key(key), Body=data)

    def upload(self, path: Path, key: str) -> None:
        with self._errors(key):
            retry(s3_client().upload_file)(str(path), self.bucket, self._key(key))

    def size(self, key: str) -> int | None:
        with self._errors(key):
            try:
                return retry(s3_client().head_object)(Bucket=self.bucket, Key=self._key(key))["ContentLength"]
            except s3_errors.ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                    return None
                raise

    def delete(self, key: str) -> None:
        with self._errors(key):
            retry(s3_client().delete_object)(Bucket=self.bucket, Key=self._key(key))

    def remove_leftovers(self) -> None:
        """Nothing to do: the bucket's lifecycle rule removes parts of unfinished uploads (docs/data.md)."""

    def walk(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = self._key("")
        further: dict[str, Any] | None = {}
        while further is not None:
            with self._errors(prefix):
                page = retry(s3_client().list_objects_v2)(Bucket=self.bucket, Prefix=start + prefix, **further)
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # consoles make an empty object to show a folder
                    yield ObjectInfo(entry["Key"][len(start) :], entry["Size"], entry["ETag"].strip('"'))
            further = {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else None

    @retry
    def _get(self, key: str, size: int | None) -> bytes:
        answer = s3_client().get_object(Bucket=self.bucket, Key=self._key(key))
        # Checked before the body is read: a short body also has a wrong checksum, and would count as damaged.
        require_size(answer.get("ContentLength", size), f"{self.url}/{key}", size)
        return answer["Body"].read()

    @retry
    def _get_range(self, key: str, offset: int, length: int) -> bytes:
        data = read_range_quickly(self.bucket, self._key(key), offset, length)
        if data is not None and len(data) == length:
            return data
        url = f"{self.url}/{key}"
        span = f"bytes={offset}-{offset + length - 1}"
        try:
            answer = s3_client().get_object(Bucket=self.bucket, Key=self._key(key), Range=span)
        except s3_errors.ClientError as error:
            if error.response["Error"]["Code"] == "InvalidRange":
                return whole(b"", url, offset, length)  # it begins behind the object's end
            raise
        data = answer["Body"].read()
        total = answer.get("ContentRange", "").rpartition("/")[2]
        if len(data) != length and total.isdigit() and int(total) >= offset + length:
            raise ShortAnswerError(too_short(data, url, offset, length, "answer"))
        return whole(data, url, offset, length)

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
            raise StorageOutageError(f"{url}: no credentials from where they come from here: {error}") from None
        except (s3_errors.PartialCredentialsError, s3_errors.ProfileNotFound) as error:
            raise DataError(f"{url}: {error}; correct AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret") from None
        except s3_errors.FlexibleChecksumError as error:
            raise DamagedError(f"{url}: damaged: its checksum is not the one stored with it") from error
        except _FAILURES as error:
            raise _explained(error, url, self.bucket) from error


def _explained(error: BaseException, url: str, bucket: str) -> DataError:
    """What a failed request says to the user."""
    if isinstance(error, boto3.exceptions.S3UploadFailedError):
        error = error.__cause__ or error.__context__ or error
    if may_pass(error):
        return StorageOutageError(f"{url}: {error}; is the object store up, is AWS_ENDPOINT_URL right?")
    code = error.response["Error"]["Code"] if isinstance(error, s3_errors.ClientError) else ""
    if code in ("NoSuchKey", "404"):
        return NotFoundError(f"{url}: no such object")
    if code == "NoSuchBucket":
        return DataError(f"{url}: no bucket {bucket}; create it or correct the URL")
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        credentials = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
        return DataError(f"{url}: access denied; check {credentials}")
    return DataError(f"{url}: {error}")
