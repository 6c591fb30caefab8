"""How long, and after which errors, a request to an object store is repeated."""

import contextlib
import math
import os
from collections.abc import Iterator

import boto3
import botocore.exceptions as s3_errors
import tenacity
from urllib3.exceptions import HTTPError

from datasets_etl.errors import DataError
from datasets_etl.objects import ShortAnswerError

# Transient errors: the server is away or busy, or an answer broke off on the way.
_PASSING = (
    s3_errors.HTTPClientError,
    s3_errors.ConnectionError,
    s3_errors.IncompleteReadError,
    s3_errors.FlexibleChecksumError,
    s3_errors.CredentialRetrievalError,
    HTTPError,
    ConnectionError,
    ShortAnswerError,
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
    return (state.seconds_since_start or 0.0) > patience_s() and state.attempt_number > 1


def patience_s() -> float:
    """What `PATIENCE_VARIABLE` says. Raises DataError if that is no number of seconds."""
    given = os.environ.get(PATIENCE_VARIABLE, "10")
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:  # NaN is neither more nor less
        raise DataError(f"{PATIENCE_VARIABLE}={given}: not a number of seconds; set it to one, such as 60")
    return seconds


# Every request is idempotent: reads, listings, deletions, and writes of whole objects. botocore's own retries come
# first, but they cover neither bodies that break off nor a server that is away for seconds.
retry = tenacity.retry(
    retry=tenacity.retry_if_exception(may_pass),
    stop=_out_of_patience,
    wait=tenacity.wait_exponential_jitter(multiplier=0.3, max=10.0),
    reraise=True,
)
