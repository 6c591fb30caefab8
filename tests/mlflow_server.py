"""A real MLflow server for the tests: SQLite behind it, artifacts in S3, killed and started again at will."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from infra.local_stack.settings import free_ports
from tests.seaweedfs import S3Server

_WAIT_SECONDS = 120


@dataclass
class MlflowServer:
    """A server whose database lies in a folder."""

    folder: Path
    s3: S3Server
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        (self._port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Returns once it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", "s3://data/mlflow"]
        environment = {
            **os.environ,
            **self.s3.settings,
            "MLFLOW_S3_ENDPOINT_URL": self.s3.endpoint,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self._wait(self._process)

    def kill(self) -> None:
        """SIGKILL, as a machine that fails."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def _log(self) -> Path:
        return self.folder / "server.log"

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
            except OSError:
                assert process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.3)
            else:
                return


@contextlib.contextmanager
def mlflow_running(folder: Path, s3: S3Server) -> Iterator[MlflowServer]:
    """A server for the length of a `with`."""
    server = MlflowServer(folder, s3)
    try:
        server.start()
        yield server
    finally:
        server.kill()
