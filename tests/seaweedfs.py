"""A real S3 server (SeaweedFS) with authentication, on loopback, that can be killed and started again."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from botocore.config import Config


@dataclass
class S3Server:
    """SeaweedFS in a folder. `environment` is what a client needs."""

    folder: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"AWS_ACCESS_KEY_ID": "tests-key", "AWS_SECRET_ACCESS_KEY": "tests-secret"}
    )
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self._ports = free_ports(10)
        self.endpoint = f"http://127.0.0.1:{self._ports[3]}"

    @property
    def settings(self) -> dict[str, str]:
        """Environment that makes it the default of boto3."""
        return {**self.environment, "AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    def start(self) -> None:
        """Returns once it takes objects."""
        names = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")
        flags = [f"-{name}={port}" for name, port in zip(names, self._ports[:5], strict=True)]
        flags += [f"-{name}.grpc={port}" for name, port in zip(names, self._ports[5:], strict=True)]
        weed = str(Path(sys.executable).with_name("weed"))  # the virtual environment need not be on the PATH
        command = [weed, "-logtostderr=true", "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [*flags, "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.telemetry=false", "-s3.autoCreateBucket=false"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment, "S3_BUCKET": "data", "GOMEMLIMIT": "512MiB"},
                start_new_session=True,
            )
        self._wait(self._process)

    def kill(self) -> None:
        """SIGKILL, as a machine that fails."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                self.client().put_object(Bucket="data", Key="ready", Body=b"")
            except Exception as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server did not start: {self._log.read_text()[-2000:]}") from error
                time.sleep(0.2)
            else:
                return


@contextlib.contextmanager
def running(folder: Path) -> Iterator[S3Server]:
    """A server for the length of a `with`."""
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


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
