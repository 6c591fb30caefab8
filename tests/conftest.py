"""What the tests share: the samples at hand, a small sharded dataset, a real S3 server, a local Ray."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from pipelines.cluster import connected

ROOT = Path(__file__).parents[1]


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: no samples to test with")
    return Path(value)


@pytest.fixture(scope="session")
def samples() -> Path:
    """Real FlyingChairs, Sintel and KITTI pairs."""
    return _folder("GMFLOW_SAMPLES")


@pytest.fixture(scope="session")
def format_samples() -> Path:
    """FlyingThings3D and HD1K layouts."""
    return _folder("GMFLOW_FORMAT_SAMPLES")


@pytest.fixture(scope="session")
def reference() -> Path:
    """Published weights, reference outputs and gradients."""
    return _folder("GMFLOW_REFERENCE")


@dataclass(frozen=True)
class S3Server:
    """A running S3 server: its endpoint and what a client's environment needs."""

    endpoint: str
    environment: dict[str, str]

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with authentication, on loopback."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    ports = free_ports(10)
    environment = {"AWS_ACCESS_KEY_ID": "tests-key", "AWS_SECRET_ACCESS_KEY": "tests-secret"}
    names = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")
    flags = [f"-{name}={port}" for name, port in zip(names, ports[:5], strict=True)]
    flags += [f"-{name}.grpc={port}" for name, port in zip(names, ports[5:], strict=True)]
    weed = str(Path(sys.executable).with_name("weed"))  # the virtual environment need not be on the PATH
    command = [weed, "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *flags]
    command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.telemetry=false", "-s3.autoCreateBucket=false"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment, "S3_BUCKET": "data", "GOMEMLIMIT": "512MiB"},
            start_new_session=True,
        )
    server = S3Server(f"http://127.0.0.1:{ports[3]}", environment)
    try:
        _wait_for_s3(server, process, folder / "server.log")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_s3(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            server.client().put_object(Bucket="data", Key="ready", Body=b"")
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.2)
        else:
            return


@pytest.fixture(scope="session")
def s3(s3_server: S3Server) -> Iterator[S3Server]:
    """The S3 server as the default of this process and of those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        settings = {"AWS_ENDPOINT_URL": s3_server.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**s3_server.environment, **settings}.items():
            patch.setenv(name, value)
        yield s3_server


@pytest.fixture(scope="session")
def local_ray(s3: S3Server) -> Iterator[None]:
    """One local Ray for the tests that need no cluster of their own; its workers know the S3 server."""
    with connected(2):
        yield


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on now, outside the range of Ray's workers (10002 to 19999)."""
    sockets = []
    while len(sockets) < count:
        candidate = socket.socket()
        candidate.bind(("127.0.0.1", 0))
        if 10002 <= candidate.getsockname()[1] <= 19999:
            candidate.close()
        else:
            sockets.append(candidate)
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
