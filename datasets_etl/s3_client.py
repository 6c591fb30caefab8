"""The S3 client of a process, and the quick way to read byte ranges past it."""

import functools
import os
import time
from typing import TYPE_CHECKING, Literal

import boto3
import botocore.exceptions as s3_errors
import botocore.session
from botocore.config import Config
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from datasets_etl.errors import DataError
from datasets_etl.range_reads import RangeReader
from datasets_etl.storage_retries import patience_s, retry

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
# EC2's metadata service, which gives machines their credentials. botocore asks it once, for a second: too little where
# all loader processes of a machine ask at the same time.
_METADATA_SERVICE = {"metadata_service_timeout": 2, "metadata_service_num_attempts": 3}


def s3_client() -> "S3Client":
    """This process's client. Raises DataError for impossible settings, and botocore's error without credentials."""
    return _client_of_process(os.getpid())


@functools.lru_cache(maxsize=1)
@retry
def _client_of_process(pid: int) -> "S3Client":
    """One client per process: a fork must not share sockets."""
    patience_s()  # report a wrong value now, not in the middle of training when storage is away
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


def _addressing_style(settings: botocore.session.Session) -> Literal["path", "virtual"] | None:
    """Where an object's bucket stands in its URL; None to leave it to the user's profile, if that says anything of S3.

    Servers other than AWS seldom have a DNS name for every bucket. For AWS, botocore would by default sign URLs of the
    host of all regions, which knows only the older ones.
    """
    if os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        return "path"
    return None if {"endpoint_url", "services", "s3"} & settings.get_scoped_config().keys() else "virtual"


def read_range_quickly(bucket: str, key: str, offset: int, length: int) -> bytes | None:
    """Reads with a signed URL, the same for all samples of a shard. This takes a fifth of the CPU time of `get_object`,
    and training needs the CPU for decoding, too. Returns None for any answer other than the bytes: `get_object` then
    handles the case.
    """
    reader = _range_reader(os.getpid())
    if reader is None:
        return None
    url = _signed_url(bucket, key, int(time.monotonic() // _SIGNATURE_S))
    return reader.read(url, offset, length)


@functools.lru_cache(maxsize=_SIGNATURES)
def _signed_url(bucket: str, key: str, period: int) -> str:
    """The URL for reading an object in this `period` of `_SIGNATURE_S` seconds."""
    place = {"Bucket": bucket, "Key": key}
    return s3_client().generate_presigned_url("get_object", Params=place, ExpiresIn=_SIGNATURE_S + _SIGNATURE_LEFT_S)


@functools.lru_cache(maxsize=1)
def _range_reader(pid: int) -> RangeReader | None:
    """The reader trusts the certificates that botocore trusts. None if proxies are set, which only botocore handles."""
    if get_environ_proxies(s3_client().meta.endpoint_url):
        return None
    bundle = botocore.session.get_session().get_config_variable("ca_bundle")
    return RangeReader(get_cert_path(bundle or True), _CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
