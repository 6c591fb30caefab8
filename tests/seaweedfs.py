"""A real S3 server (SeaweedFS) with authentication, on loopback, that can be killed and started again."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.local_stack import seaweedfs
from infra.local_stack.settings import free_ports
from tests.server_process import ServerProcess
from tests.waiting import wait_until


class S3Server(ServerProcess):
    """SeaweedFS in a folder. `environment` is what a client needs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.environment = {"AWS_ACCESS_KEY_ID": "tests-key", "AWS_SECRET_ACCESS_KEY": "tests-secret"}
        (self._port,) = free_ports(1)
        self._ports: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self._port}"

    @property
    def settings(self) -> dict[str, str]:
        """Environment that makes it the default of boto3."""
        return {**self.environment, "AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    def start(self) -> None:
        """Returns once it takes objects."""
        self._try_to_start()
        if self.ended and "Port allocation failed" in self.said:  # the server of another test took one meanwhile
            self._try_to_start()
        assert not self.ended, self.said[-2000:]

    def _try_to_start(self) -> None:
        access_key, secret_key = self.environment["AWS_ACCESS_KEY_ID"], self.environment["AWS_SECRET_ACCESS_KEY"]
        environment = seaweedfs.environment(access_key, secret_key, ("data",))
        command = seaweedfs.command(self.folder, self._port)
        self._ports += re.findall(r"port(?:\.grpc)?=(\d+)", " ".join(command))
        self.launch(command, environment)
        wait_until(lambda: self.ended or self._takes_objects(), lambda: self.said[-2000:], every_s=0.2)

    def remove_sockets(self) -> None:
        """When it is killed, it leaves one for each of its ports."""
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def client(self):
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def _takes_objects(self) -> bool:
        try:
            self.client().put_object(Bucket="data", Key="ready", Body=b"")
        except (BotoCoreError, ClientError):
            return False
        return True


@contextlib.contextmanager
def running(folder: Path) -> Iterator[S3Server]:
    """A server for the length of a `with`."""
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        server.remove_sockets()
