"""A local stack for the tests that need all servers, and `ray job` as a user gives it."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.config import Config

from infra.local_stack.errors import StackError
from infra.local_stack.services import require_postgresql
from infra.local_stack.settings import Stack, free_ports
from tests.conftest import ROOT
from tests.waiting import WAIT_SECONDS

PORT_OPTIONS = ("--s3-port", "--mlflow-port", "--postgres-port", "--ray-port", "--dashboard-port")


def stack_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m infra.local_stack …` from the checkout."""
    command = [sys.executable, "-m", "infra.local_stack", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)


def port_arguments() -> list[str]:
    """Every port of a stack set to a free one."""
    ports = free_ports(len(PORT_OPTIONS))
    return [text for option, port in zip(PORT_OPTIONS, ports, strict=True) for text in (option, str(port))]


@dataclass(frozen=True)
class RunningStack:
    """What the tests do with a stack; `arguments` start it, and start it again."""

    folder: Path
    arguments: tuple[str, ...]

    @property
    def facts(self) -> Stack:
        stack = Stack.load(self.folder)
        assert stack is not None
        return stack

    def up(self) -> subprocess.CompletedProcess[str]:
        return stack_command("up", "--dir", str(self.folder), *self.arguments)

    @property
    def environment(self) -> dict[str, str]:
        """Of a shell that sourced the stack's file."""
        shell = subprocess.run(
            ["bash", "-c", f". {self.folder}/environment.sh && env -0"], capture_output=True, text=True, check=True
        )
        return dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)

    def job(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job …`, from the checkout."""
        ray = str(Path(sys.executable).with_name("ray"))
        return subprocess.run(
            [ray, "job", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )

    def submit(self, *entrypoint: str, name: str = "") -> str:
        """Submit, wait for success, return the log."""
        options = ["--submission-id", name] if name else []
        done = self.job("submit", "--working-dir", ".", *options, "--", "python", *entrypoint)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, method: str = "GET") -> dict[str, Any]:
        """What `ray job` asks the job server, at once; the command line itself takes seconds."""
        headers = {"Authorization": f"Bearer {self.facts.secrets.ray_token}"}
        request = urllib.request.Request(self.facts.dashboard_url + path, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def s3(self):
        environment = self.facts.environment
        return boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )

    def keys(self, bucket: str, prefix: str) -> list[str]:
        pages = self.s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def ray_logs(told: str) -> str:
    """The end of what the logs hold that an error names: their folder goes with the stack."""
    named = re.findall(r"/[^ ;]+gcs_server\.out|/[^ ;]+ray\.log", told)
    found = [log for name in named for log in sorted(Path(name).parent.glob(f"{Path(name).stem}.*"))]
    return "".join(f"\n{log}:\n{log.read_text()[-3000:]}" for log in found)


@pytest.fixture(scope="session")
def stack() -> Iterator[RunningStack]:
    """All servers; with PostgreSQL where this machine has it."""
    folder = Path(tempfile.mkdtemp(prefix="gmflow-stack-"))  # not pytest's: PostgreSQL's account cannot enter that
    folder.chmod(0o711)
    database = "postgresql"
    try:
        require_postgresql(folder)
    except StackError:
        database = "sqlite"
    running = RunningStack(folder, (*port_arguments(), "--database", database))
    try:
        started = running.up()
        assert started.returncode == 0, started.stdout + started.stderr + ray_logs(started.stderr)
        yield running
        names = [path.stem for path in folder.glob("*.log")]
        ended = stack_command("down", "--dir", str(folder), "--wipe")
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.count("stopped (pid ") == len(names)
        assert not folder.exists()
        assert not [each.info for each in psutil.process_iter(["cmdline"]) if str(folder) in str(each.info)]
    finally:
        stack_command("down", "--dir", str(folder), "--wipe")
        shutil.rmtree(folder, ignore_errors=True)
