"""One driver at a time: what it works on holds its claim, which it renews for as long as it lives.

Who finds a claim waits for it to be renewed. If it is, the driver lives, and a second one is refused; if it is not, the
first one is gone, and the claim is taken over. No clocks are compared, and nothing is asked of storage but to read what
was written last. Two drivers that begin in the same second may both go on for a moment: the one whose claim was
overwritten sees that when it renews it, and ends.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from datasets_etl.errors import DataError
from datasets_etl.storage import ObjectStore
from pipelines.entry import PipelineError, interrupted_by

CLAIM = "driver.json"
"""In a folder that a driver works on."""

_FIRST_RENEWAL_S = 1.0
_RENEWAL_S = 10.0
_LOOK_S = 1.0
# Four renewals: longer than the longest pause between two attempts at storage that was away.
_LOOKS = 40
_RELEASED_S = 10.0
_LOST = signal.SIGUSR1


@dataclass(frozen=True)
class Claim:
    """What a driver says of itself.

    Attributes:
        token: names the claim.
        host, pid, since: for people.
        machine, started: together with `pid` they name its process; empty where the system does not tell.
        renewed: how often.
    """

    token: str
    host: str
    pid: int
    since: str
    machine: str
    started: str
    renewed: int = 0

    @property
    def is_left(self) -> bool:
        """Whether its process was one of this machine, and has ended."""
        return bool(self.machine) and self.machine == _machine() and self.started != _started(self.pid)

    def __str__(self) -> str:
        return f"the driver on {self.host} (process {self.pid}, since {self.since})"


@contextlib.contextmanager
def claimed(folders: Mapping[str, ObjectStore], say: Callable[[str], None]) -> Iterator[None]:
    """Work on folders alone for the length of a `with`. Outside of the main thread nothing ends who loses its claim.

    Args:
        folders: by what a person calls them, such as "stage chairs".
        say: told, in a line, that a claim is waited for or taken over.

    Raises:
        PipelineError: another driver works on one of them; or took one over, because this one could not be heard of.
    """
    _wait_until_free(folders, say)
    with interrupted_by(_LOST):  # Ctrl-C's own signal may be ignored, as by what runs in a shell's background
        keeper = _Keeper(folders)
        try:
            yield
        except KeyboardInterrupt:
            if keeper.lost is not None:
                raise keeper.lost from None
            raise
        finally:
            keeper.release()


def _wait_until_free(folders: Mapping[str, ObjectStore], say: Callable[[str], None]) -> None:
    first = standing = standing_claims(folders)
    for driver, names in _by_driver(first).items():
        say(f"{names}: claimed by {driver}; waits up to {_LOOKS * _LOOK_S:.0f} s for a sign of life")
    # Counted, not timed: while storage is away nobody can renew.
    for _ in range(_LOOKS):
        if not standing:
            return
        time.sleep(_LOOK_S)
        standing = standing_claims(folders)
        for name, claim in standing.items():
            if claim != first.get(name):
                raise PipelineError(
                    f"{name}: {claim} works on it; let it go on, or stop it and give the same command again"
                )
    for driver, names in _by_driver(standing).items():
        say(f"{names}: no sign of life of {driver}: taken over")


def _by_driver(claims: Mapping[str, Claim]) -> dict[str, str]:
    """What each driver has claimed, in a line."""
    found: dict[str, list[str]] = {}
    for name, claim in claims.items():
        found.setdefault(str(claim), []).append(name)
    return {driver: ", ".join(names) for driver, names in found.items()}


def standing_claims(folders: Mapping[str, ObjectStore]) -> dict[str, Claim]:
    """Of those folders that a driver works on, as far as its claim alone can tell: one of another machine may lapse."""
    found = {name: _read(folder) for name, folder in folders.items()}
    return {name: claim for name, claim in found.items() if claim is not None and not claim.is_left}


def _read(folder: ObjectStore) -> Claim | None:
    """None where there is none, or none that can be read."""
    try:
        return Claim(**json.loads(folder.read(CLAIM)))
    except DataError:
        if folder.size(CLAIM) is None:
            return None
        raise
    except (ValueError, TypeError):
        return None


class _Keeper:
    """Renews a claim of this process in a thread whose end the process need not wait for.

    Attributes:
        lost: why the driver must end. Its main thread is interrupted then.
    """

    def __init__(self, folders: Mapping[str, ObjectStore]) -> None:
        self.lost: PipelineError | None = None
        self._folders = folders
        self._claim = _own_claim()
        self._ended = threading.Event()
        for folder in folders.values():
            self._write(folder)
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the claim up. Where storage is away it stays, and lapses."""
        self._ended.set()
        self._thread.join(_RELEASED_S)

    def _run(self) -> None:
        pause = _FIRST_RENEWAL_S
        while self.lost is None and not self._ended.wait(pause):
            pause = _RENEWAL_S
            self._claim = replace(self._claim, renewed=self._claim.renewed + 1)
            for name, folder in self._folders.items():
                with contextlib.suppress(DataError):  # storage is away: nobody else reads or writes there either
                    self._renew(name, folder)
        for folder in self._folders.values():
            with contextlib.suppress(DataError):
                if self._other(folder) is None:
                    folder.delete(CLAIM)

    def _renew(self, name: str, folder: ObjectStore) -> None:
        if (other := self._other(folder)) is None:
            self._write(folder)
        elif self.lost is None:
            self.lost = PipelineError(f"{name}: {other} has taken it over, and goes on with it: this one is ended")
            if signal.getsignal(_LOST) is signal.default_int_handler and not self._ended.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, _LOST)

    def _other(self, folder: ObjectStore) -> Claim | None:
        """A claim that has taken the place of this one."""
        found = _read(folder)
        return None if found is None or found.token == self._claim.token else found

    def _write(self, folder: ObjectStore) -> None:
        folder.write(CLAIM, json.dumps(asdict(self._claim)).encode())


def _own_claim() -> Claim:
    pid = os.getpid()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Claim(uuid.uuid4().hex, socket.gethostname(), pid, now, _machine(), _started(pid))


def _machine() -> str:
    """Names this machine since it was booted, and those of its processes that this one sees; empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine began, in the kernel's clock; empty where there is none, or it has ended."""
    try:
        state, *_, started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
    except OSError:
        return ""
    return "" if state == "Z" else started
