"""What makes up a stack: ports, sizes and generated secrets, kept in its folder; and the environment for its users."""

import json
import os
import secrets
import shlex
import socket
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from infra.local_stack.errors import StackError

HOST = "127.0.0.1"
BUCKETS = ("datasets", "training", "mlflow")
REGION = "us-east-1"

_SETTINGS = "stack.json"
_SECRETS = "secrets.json"
_ENVIRONMENT = "environment.sh"
_TOKEN = "ray_token"


@dataclass(frozen=True)
class Settings:
    """What may be chosen at `up`. The choices are kept for the next `up`.

    Attributes:
        database: where MLflow keeps its runs.
        workers: Ray nodes beside the head, which runs drivers but no training.
        cpus_per_worker: CPUs that each of these nodes offers.
    """

    s3_port: int = 8333
    mlflow_port: int = 5000
    postgres_port: int = 5433
    ray_port: int = 6380
    dashboard_port: int = 8265
    database: Literal["sqlite", "postgresql"] = "sqlite"
    workers: int = 2
    cpus_per_worker: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and not 1 <= value <= 65535:
                raise StackError(f"--{name.replace('_', '-')} {value}: out of range, give 1 to 65535")


@dataclass(frozen=True)
class Secrets:
    """Secrets, generated once for each stack."""

    s3_access_key: str
    s3_secret_key: str
    mlflow_password: str
    mlflow_cookie_key: str
    postgres_password: str
    ray_token: str

    @classmethod
    def fresh(cls) -> Self:
        return cls(**{field.name: secrets.token_hex(20) for field in fields(cls)})


@dataclass(frozen=True)
class Stack:
    """A stack's folder and what is in it."""

    folder: Path
    settings: Settings
    secrets: Secrets

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The stack in a folder; None if there is none."""
        folder = folder.absolute()
        if not (folder / _SETTINGS).exists():
            return None
        try:
            settings = Settings(**json.loads((folder / _SETTINGS).read_text()))
            return cls(folder, settings, Secrets(**json.loads((folder / _SECRETS).read_text())))
        except (OSError, ValueError, TypeError) as error:
            raise StackError(f"{folder}: not readable as a stack ({error}); remove it or give another --dir") from error

    @classmethod
    def create(cls, folder: Path) -> Self:
        """A new stack, in a folder that is empty or does not exist."""
        folder = folder.absolute()
        if folder.exists() and any(folder.iterdir()):
            raise StackError(f"{folder}: not empty and no stack; give another --dir")
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)  # if this is root, PostgreSQL runs as another account, which may enter but not list
        return cls(folder, Settings(), Secrets.fresh())

    def changed(self, given: dict[str, Any]) -> Self:
        return replace(self, settings=replace(self.settings, **given))

    def save(self) -> None:
        _write_private(self.folder / _SECRETS, json.dumps(asdict(self.secrets), indent=1))
        _write_private(self.token_file, self.secrets.ray_token)
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        _write_private(self.environment_file, "\n".join(lines) + "\n")
        _write_private(self.folder / _SETTINGS, json.dumps(asdict(self.settings), indent=1))

    @property
    def environment_file(self) -> Path:
        return self.folder / _ENVIRONMENT

    @property
    def token_file(self) -> Path:
        return self.folder / _TOKEN

    @property
    def s3_url(self) -> str:
        return f"http://{HOST}:{self.settings.s3_port}"

    @property
    def mlflow_url(self) -> str:
        return f"http://{HOST}:{self.settings.mlflow_port}"

    @property
    def dashboard_url(self) -> str:
        return f"http://{HOST}:{self.settings.dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell, and every Ray node, needs to reach the servers."""
        return {
            "AWS_ACCESS_KEY_ID": self.secrets.s3_access_key,
            "AWS_SECRET_ACCESS_KEY": self.secrets.s3_secret_key,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.s3_url,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self.secrets.mlflow_password,
            # For `ray job`; RAY_ADDRESS would make every script believe that it runs inside the cluster.
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
        }


def _write_private(path: Path, content: str) -> None:
    """Write a file whole or not at all, and never readable for others, not even for a moment."""
    beside = path.with_name(f".{path.name}.part")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    beside.replace(path)


def require_free(port: int, service: str, option: str) -> None:
    """Raises StackError if something listens on the port."""
    if not is_free(port):
        raise StackError(f"port {port}, for {service}, is taken; free it or give {option} PORT")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_ports(count: int, below: int = 32768) -> list[int]:
    """Ports from 20,000 to below `below` on which nothing listens now.

    The system itself hands out ports from 32,768 on, so these are left out: others might get them before they are used,
    and gRPC servers even share a port silently. The ports of Ray's workers (10,002 to 19,999) are left out too.
    """
    found: list[int] = []
    while len(found) < count:
        port = 20_000 + secrets.randbelow(below - 20_000)
        if port not in found and is_free(port):
            found.append(port)
    return found
