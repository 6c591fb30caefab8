"""A real MLflow server for the tests: SQLite behind it, artifacts in S3, killed and started again at will."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from infra.local_stack.settings import free_ports
from tests.seaweedfs import S3Server
from tests.server_process import ServerProcess
from tests.waiting import answers, wait_until


class MlflowServer(ServerProcess):
    """A server whose database lies in a folder."""

    def __init__(self, folder: Path, s3: S3Server) -> None:
        super().__init__(folder)
        self.folder = folder
        self.s3 = s3
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
        self.launch(command, environment)
        wait_until(self._answers, lambda: self.said, every_s=0.3)

    def _answers(self) -> bool:
        assert not self.ended, self.said
        return answers(f"{self.url}/health")


@contextlib.contextmanager
def mlflow_running(folder: Path, s3: S3Server) -> Iterator[MlflowServer]:
    """A server for the length of a `with`."""
    server = MlflowServer(folder, s3)
    try:
        server.start()
        yield server
    finally:
        server.kill()
