"""The servers of a stack in the order they start: how each is launched, and how it shows that it works."""

import base64
import configparser
import contextlib
import getpass
import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import boto3
import psycopg2
from botocore.config import Config

from infra.local_stack import seaweedfs
from infra.local_stack.errors import StackError
from infra.local_stack.processes import Launch, ServerProcess
from infra.local_stack.settings import BUCKETS, HOST, REGION, Stack, free_ports
from pipelines.wording import counted

_PROBE_SECONDS = 5
_DATABASES = ("mlflow", "mlflow_auth")


@dataclass(frozen=True)
class Service:
    """One server.

    Attributes:
        name: its name in messages and file names.
        address: the address at which its users reach it.
        ports: port → the option that sets it.
        launch: prepares the server's folder and returns how to start it.
        probe: asks something that only a working server with our credentials answers; returns facts in one line.
    """

    name: str
    address: str
    ports: Mapping[int, str]
    launch: Callable[[], Launch]
    probe: Callable[[], str]

    def process(self, stack: Stack) -> ServerProcess:
        return ServerProcess(stack.folder, self.name)


def services(stack: Stack) -> list[Service]:
    """The services of a stack, each after the ones it needs."""
    chosen = [_s3(stack)]
    if stack.settings.database == "postgresql":
        chosen.append(_postgresql(stack))
    return [*chosen, _mlflow(stack), _ray(stack)]


def _s3(stack: Stack) -> Service:
    def launch() -> Launch:
        folder = _made(stack.folder / "s3-data")
        secrets = stack.secrets
        return Launch(
            seaweedfs.command(folder, stack.settings.s3_port),
            seaweedfs.environment(secrets.s3_access_key, secrets.s3_secret_key, BUCKETS),
            stack.folder,
        )

    def probe() -> str:
        client = boto3.client(
            "s3",
            endpoint_url=stack.s3_url,
            aws_access_key_id=stack.secrets.s3_access_key,
            aws_secret_access_key=stack.secrets.s3_secret_key,
            region_name=REGION,
            config=Config(
                connect_timeout=_PROBE_SECONDS,
                read_timeout=_PROBE_SECONDS,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )
        client.put_object(Bucket=BUCKETS[0], Key=".probe", Body=b"")  # the server may answer before it can store
        client.delete_object(Bucket=BUCKETS[0], Key=".probe")
        return "buckets " + ", ".join(bucket["Name"] for bucket in client.list_buckets()["Buckets"])

    return Service("s3", stack.s3_url, {stack.settings.s3_port: "--s3-port"}, launch, probe)


def _postgresql(stack: Stack) -> Service:
    port = stack.settings.postgres_port

    def launch() -> Launch:
        programs, account = require_postgresql(stack.folder)
        data = stack.folder / "postgresql-data"
        if not (data / "PG_VERSION").exists():
            _initialise_postgresql(stack, programs, account, data)
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port)]
        command += ["-c", f"listen_addresses={HOST}", "-c", "unix_socket_directories="]
        return Launch(command, dict(os.environ), data, account)

    def probe() -> str:
        url = _postgresql_url(stack, "postgres")
        with contextlib.closing(psycopg2.connect(url, connect_timeout=_PROBE_SECONDS)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute("SELECT datname FROM pg_database")
            there = {name for (name,) in cursor.fetchall()}
            for name in _DATABASES:
                if name not in there:
                    cursor.execute(f"CREATE DATABASE {name}")
            cursor.execute("SHOW server_version")
            (version,) = cursor.fetchone() or ("?",)
            return f"PostgreSQL {version.split()[0]}, databases {', '.join(_DATABASES)}"

    return Service("postgresql", f"{HOST}:{port}", {port: "--postgres-port"}, launch, probe)


def _postgresql_url(stack: Stack, database: str) -> str:
    return f"postgresql://gmflow:{stack.secrets.postgres_password}@{HOST}:{stack.settings.postgres_port}/{database}"


def require_postgresql(folder: Path) -> tuple[Path, str | None]:
    """Folder of PostgreSQL's server programs, and the account to run them as, since they refuse root.

    The account is None for that of this process. Raises StackError if the programs or the account are missing, or if
    the account cannot reach `folder`.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    on_path = shutil.which("initdb")
    if not found and on_path is None:
        raise StackError("no PostgreSQL server: install the package postgresql, or give --database sqlite")
    programs = found[-1].parent if found else Path(on_path or "").parent
    if os.geteuid() != 0:
        return programs, None
    try:
        account = pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise StackError(
            "PostgreSQL does not run as root, and there is no account postgres; give --database sqlite"
        ) from None
    reached = subprocess.run(["test", "-x", folder], user=account, group=account, extra_groups=[], check=False)
    if reached.returncode:
        raise StackError(
            f"PostgreSQL runs as {account}, who cannot enter {folder}; give another --dir, or --database sqlite"
        )
    return programs, account


def _initialise_postgresql(stack: Stack, programs: Path, account: str | None, data: Path) -> None:
    shutil.rmtree(data, ignore_errors=True)  # an `up` that was killed may have left it half made
    data.mkdir(mode=0o700)
    with tempfile.NamedTemporaryFile("w", prefix="gmflow-", suffix=".pw") as password:
        password.write(stack.secrets.postgres_password)
        password.flush()
        if account is not None:
            shutil.chown(data, account, account)
            shutil.chown(password.name, account, account)
        command = [str(programs / "initdb"), "-D", str(data), "-U", "gmflow", "--auth=scram-sha-256"]
        command += [f"--pwfile={password.name}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        made = subprocess.run(
            command,
            user=account,
            group=account,
            extra_groups=None if account is None else [],
            cwd=data,
            capture_output=True,
            text=True,
            check=False,
        )
    if made.returncode:
        shutil.rmtree(data, ignore_errors=True)
        raise StackError(f"PostgreSQL's initdb failed in {data}: {made.stderr.strip().splitlines()[-1]}")


def _mlflow(stack: Stack) -> Service:
    port = stack.settings.mlflow_port

    def database(name: str) -> str:
        if stack.settings.database == "sqlite":
            return f"sqlite:///{stack.folder}/{name}.db"
        return _postgresql_url(stack, name).replace("://", "+psycopg2://")  # by default SQLAlchemy uses another driver

    def launch() -> Launch:
        runs, users = _DATABASES
        accounts = configparser.ConfigParser(interpolation=None)
        accounts["mlflow"] = {
            "default_permission": "READ",
            "database_uri": database(users),
            "auth_cache_ttl_seconds": "60",  # otherwise every request takes tenths of a second to hash the password
        }
        path = stack.folder / "mlflow_auth.ini"
        path.touch(mode=0o600)
        with path.open("w") as file:
            accounts.write(file)
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
        command += ["--app-name", "basic-auth", "--artifacts-destination", "s3://mlflow/artifacts"]
        environment = _clean_environment() | {
            **{name: value for name, value in stack.environment.items() if name.startswith("AWS_")},
            "MLFLOW_S3_ENDPOINT_URL": stack.s3_url,
            "MLFLOW_BACKEND_STORE_URI": database(runs),  # not an argument: `ps` would show the password
            "MLFLOW_AUTH_CONFIG_PATH": str(path),
            "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
            "MLFLOW_AUTH_ADMIN_PASSWORD": stack.secrets.mlflow_password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": stack.secrets.mlflow_cookie_key,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        return Launch(command, environment, stack.folder)

    def probe() -> str:
        login = base64.b64encode(f"admin:{stack.secrets.mlflow_password}".encode()).decode()
        headers = {"Authorization": f"Basic {login}"}
        experiments = _get(f"{stack.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1000", headers)
        version = _get(f"{stack.mlflow_url}/version", headers).decode()
        return f"MLflow {version}, {counted(len(json.loads(experiments).get('experiments', [])), 'experiment')}"

    return Service("mlflow", stack.mlflow_url, {port: "--mlflow-port"}, launch, probe)


def _ray(stack: Stack) -> Service:
    settings = stack.settings
    nodes = settings.workers + 1
    agent_port = stack.folder / "ray_agent_port"

    def launch() -> Launch:
        (port,) = free_ports(1)
        agent_port.write_text(str(port))
        command = [sys.executable, "-m", "infra.local_stack.ray_cluster", "--port", str(settings.ray_port)]
        command += ["--dashboard-port", str(settings.dashboard_port), "--agent-port", str(port)]
        command += ["--workers", str(settings.workers)]
        command += ["--cpus-per-worker", str(settings.cpus_per_worker), "--temp", str(_made(ray_folder(stack)))]
        environment = _clean_environment() | stack.environment
        # The `python` of a job is the one that runs this process; a job's code is what it uploads.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment["RAY_USAGE_STATS_ENABLED"] = "0"
        del environment["RAY_API_SERVER_ADDRESS"]
        return Launch(command, environment, Path(__file__).parents[2])

    def probe() -> str:
        headers = {"Authorization": f"Bearer {stack.secrets.ray_token}"}
        answer = json.loads(_get(f"{stack.dashboard_url}/api/v0/nodes", headers))
        alive = [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]
        if len(alive) < nodes:
            raise OSError(f"{len(alive)} of {nodes} nodes are up")
        _get(f"http://{HOST}:{agent_port.read_text()}/api/local_raylet_healthz", headers)  # without it no job starts
        cpus = sum(node["resources_total"].get("CPU", 0) for node in alive)
        version = json.loads(_get(f"{stack.dashboard_url}/api/version", headers))["ray_version"]
        return f"Ray {version}, head and {nodes - 1} workers, {cpus:g} CPUs"

    ports = {settings.dashboard_port: "--dashboard-port", settings.ray_port: "--ray-port"}
    return Service("ray", stack.dashboard_url, ports, launch, probe)


def ray_folder(stack: Stack) -> Path:
    """Folder for the nodes' temporary directories, not in the stack's: a socket's path has at most 107 characters."""
    name = hashlib.sha256(str(stack.folder).encode()).hexdigest()[:8]
    return Path(tempfile.gettempdir()) / f"gmflow-ray-{getpass.getuser()}-{name}"


def _clean_environment() -> dict[str, str]:
    """This process's environment without what would affect servers: module paths, and other servers' addresses."""
    foreign = ("PYTHON", "AWS_", "MLFLOW_", "RAY_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _get(url: str, headers: Mapping[str, str]) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers)), timeout=_PROBE_SECONDS) as answer:
        return bytes(answer.read())
