"""Let only one driver at a time work on a folder: the folder holds the driver's claim, which it renews while it lives.

A driver that finds a claim waits for it to be renewed. If it is renewed, the first driver lives, and the second one is
refused. If it is not, the first one is gone, and the second takes the claim over. No clocks are compared, and storage
only has to return what was written last. Two drivers that begin in the same second may both go on for a moment: the one
whose claim was overwritten sees that when it renews the claim, and ends.
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

from datasets_etl.errors import DataError
from datasets_etl.objects import ObjectStore
from pipelines.entry import PipelineError, interrupted_by
from pipelines.same_process import start_time, this_machine

CLAIM = "driver.json"
"""Key of the claim in a folder that a driver works on."""

_FIRST_RENEWAL_S = 1.0
_RENEWAL_S = 10.0
_LOOK_S = 1.0
# Time for four renewals: longer than the longest pause between two attempts to reach storage that is down.
_LOOKS = 40
# A claim that was renewed this long ago may have been taken over since.
_SURE_S = 25.0
_ANSWERED_S = 3.0
_RELEASED_S = 10.0
_LOST = signal.SIGUSR1


@dataclass(frozen=True)
class Claim:
    """What a driver says about itself.

    Attributes:
        token: unique name of the claim.
        host, pid, since: for messages to people.
        machine, started: with `pid` they identify its process; empty where the system does not give them.
        renewed: how often the claim was renewed.
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
        """Whether its process ran on this machine and has ended."""
        return bool(self.machine) and self.machine == this_machine() and self.started != start_time(self.pid)

    def __str__(self) -> str:
        return f"the driver on {self.host} (process {self.pid}, since {self.since})"


@contextlib.contextmanager
def claimed(folders: Mapping[str, ObjectStore], say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Claim folders for the length of a `with`. A driver that loses a claim is interrupted only in the main thread.

    Yields a function that tells whether the claim is still held: other threads ask it before they write for others to
    see, as a driver that stood still may have been taken over.

    Args:
        folders: the folders by the names that messages use, such as "stage chairs".
        say: called with one line when a claim is waited for or taken over.

    Raises:
        PipelineError: another driver works on one of them, or took one over because this one gave no sign of life.
    """
    _wait_until_free(folders, say)
    with interrupted_by(_LOST):  # not SIGINT: a shell's background jobs ignore it
        keeper = _Keeper(folders)
        try:
            yield keeper.is_held
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
    # Looks are counted instead of timed, because nobody can renew a claim while storage is down.
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
    """Driver → the names of what it has claimed, in one line."""
    found: dict[str, list[str]] = {}
    for name, claim in claims.items():
        found.setdefault(str(claim), []).append(name)
    return {driver: ", ".join(names) for driver, names in found.items()}


def standing_claims(folders: Mapping[str, ObjectStore]) -> dict[str, Claim]:
    """Folder name → claim, if a driver may hold it. The driver of a claim from another machine may have ended."""
    found = {name: _read(folder) for name, folder in folders.items()}
    return {name: claim for name, claim in found.items() if claim is not None and not claim.is_left}


def _read(folder: ObjectStore) -> Claim | None:
    """The claim in a folder; None if there is none or its content is not a claim."""
    try:
        return Claim(**json.loads(folder.read(CLAIM)))
    except DataError:
        if folder.size(CLAIM) is None:
            return None
        raise
    except (ValueError, TypeError):
        return None


class _Keeper:
    """Renews this process's claim in a daemon thread, so that the process can end without waiting for it.

    The claim is held until it is lost to another driver or released. Who asks meanwhile whether it still is gets the
    answer from a renewal that begins then.

    Attributes:
        lost: why the driver must end; None while it need not. When this is set, the main thread is interrupted.
    """

    def __init__(self, folders: Mapping[str, ObjectStore]) -> None:
        self.lost: PipelineError | None = None
        self._folders = folders
        self._claim = _own_claim()
        self._renewed = _seconds_since_boot()
        self._released = False
        self._answer_by: float | None = None  # until when to wait for the answer to an open question
        self._changed = threading.Condition()  # notified of changes of these two, and of `lost`
        try:
            for folder in folders.values():
                self._write(folder)
        except DataError:
            self._give_up()
            raise
        self._thread = threading.Thread(target=self._run, name="claim", daemon=True)
        self._thread.start()

    def is_held(self) -> bool:
        """Whether no other driver has taken the claim over.

        If it was not renewed lately, it is now, in a moment. While storage is down, nobody takes it over; then only the
        first who asks waits for that moment.
        """
        if self.lost is None and _seconds_since_boot() - self._renewed > _SURE_S:
            with self._changed:
                if self._answer_by is None:
                    self._answer_by = time.monotonic() + _ANSWERED_S
                    self._changed.notify_all()
                self._changed.wait_for(self._is_answered, self._answer_by - time.monotonic())
        return self.lost is None

    def _is_answered(self) -> bool:
        return self._answer_by is None or self.lost is not None

    def release(self) -> None:
        """Give up the claim. If storage is down, the claim stays there and lapses."""
        with self._changed:
            self._released = True
            self._changed.notify_all()
        self._thread.join(_RELEASED_S)

    def _run(self) -> None:
        pause = _FIRST_RENEWAL_S
        while self.lost is None:
            with self._changed:
                self._changed.wait_for(lambda: self._released or self._answer_by is not None, pause)
                question = self._answer_by
            if self._released:
                break
            pause = _RENEWAL_S
            self._claim = replace(self._claim, renewed=self._claim.renewed + 1)
            self._renew_all()
            with self._changed:
                if self._answer_by == question:  # what was asked since is answered by the next renewal
                    self._answer_by = None
                self._changed.notify_all()
        self._give_up()

    def _give_up(self) -> None:
        """Delete this claim wherever it stands."""
        for folder in self._folders.values():
            with contextlib.suppress(DataError):
                if self._is_own(_read(folder)):
                    folder.delete(CLAIM)

    def _renew_all(self) -> None:
        begun = _seconds_since_boot()
        failed = False
        for name, folder in self._folders.items():
            try:
                self._renew(name, folder)
            except DataError:  # storage is down: nobody else can read or write there either
                failed = True
        if not failed:
            self._renewed = begun

    def _renew(self, name: str, folder: ObjectStore) -> None:
        found = _read(folder)
        if self._is_own(found):
            if not self._released:  # another attempt of this process may look for a claim by now
                self._write(folder)
        elif self.lost is None:
            # Who took over writes its own claim at once, and deletes it when it ends.
            done = (
                f"{found} has taken it over, and goes on with it" if found else "another driver took it over and ended"
            )
            self.lost = PipelineError(f"{name}: {done}: this one is ended")
            if signal.getsignal(_LOST) is signal.default_int_handler and not self._released:
                signal.pthread_kill(threading.main_thread().ident or 0, _LOST)

    def _is_own(self, found: Claim | None) -> bool:
        return found is not None and found.token == self._claim.token

    def _write(self, folder: ObjectStore) -> None:
        folder.write(CLAIM, json.dumps(asdict(self._claim)).encode())


def _seconds_since_boot() -> float:
    """A monotonic clock in seconds that goes on while the machine is suspended; `time.monotonic` stands still then."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _own_claim() -> Claim:
    pid = os.getpid()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Claim(uuid.uuid4().hex, socket.gethostname(), pid, now, this_machine(), start_time(pid))
