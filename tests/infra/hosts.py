"""Hosts on one machine: a network namespace each, with an address, a name and node-local folders of its own.

They hang on a switch in one more namespace. Nothing outside the namespaces is touched. Needs root.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.waiting import wait_until

# What a host does before its command: as on a stock Debian, its own name leads to loopback.
_BOOT = """
hostname "$1"
mount -t tmpfs -o mode=0777 tmpfs "$2"
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$1" > "$2/hosts"
mount --bind "$2/hosts" /etc/hosts
shift 2
exec "$@"
"""


@dataclass
class Host:
    """One of them. `local` is the same path on every host and another folder on each."""

    name: str
    address: str
    namespace: str
    switch: str
    folder: Path
    local: Path
    environment: Mapping[str, str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def start(self, *command: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """The host's own server; its file systems are this command's and its children's."""
        boot = ["unshare", "--mount", "--uts", "sh", "-ec", _BOOT, "boot", self.name, str(self.local)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *boot, *command],
                env={**self.environment, "TMPDIR": str(self.local), **(environment or {})},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run(self, *command: str, environment: Mapping[str, str] | None = None) -> str:
        """A client on the host's network; returns what it printed on stdout."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, *command],
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def cut_off(self) -> None:
        """Pull its cable out of the switch."""
        _ip("-n", self.switch, "link", "set", f"to-{self.name}", "down")

    def processes(self) -> dict[int, str]:
        """Pid → title of what runs on it."""
        pids = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        found = {}
        for pid in map(int, pids.stdout.split()):
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def shut_down(self) -> None:
        wait_until(self._killed, self.processes)
        for process in self.started:
            process.wait()

    def _killed(self) -> bool:
        pids = list(self.processes())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.poll()
        return not pids


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def possible() -> bool:
    """Whether this account may make namespaces here."""
    if os.geteuid() != 0:
        return False
    probe = f"gmflow-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
        subprocess.run(["unshare", "--mount", "--uts", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextlib.contextmanager
def connected_hosts(names: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[dict[str, Host]]:
    """Hosts on one switch for the length of a `with`: 10.231.7.1 and on, in the order of `names`."""
    switch = f"gmflow-{os.getpid()}-switch"
    local = Path(tempfile.mkdtemp(prefix="gmflow-"))  # short: Ray keeps sockets in it
    hosts = {
        name: Host(name, f"10.231.7.{number}", f"gmflow-{os.getpid()}-{name}", switch, folder, local, environment)
        for number, name in enumerate(names, 1)
    }
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "switch", "up")
        for host in hosts.values():
            _ip("netns", "add", host.namespace)
            port = f"to-{host.name}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", port, "master", "switch", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for host in hosts.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                host.shut_down()
        for namespace in (switch, *(host.namespace for host in hosts.values())):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
        local.rmdir()
