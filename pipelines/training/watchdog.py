"""Ends a worker that hangs: a lost peer in a collective, a dead mount or a bug would otherwise hold it for ever."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

_EXIT_CODE = 70


class Watchdog:
    """Watches that a worker makes progress.

    Args:
        limit_s: seconds without progress after which the process is ended.
        tell: called with a line that says so, before the end.
    """

    def __init__(self, limit_s: float, tell: Callable[[str], None]) -> None:
        self._limit_s = limit_s
        self._tell = tell
        self._doing = "starting"
        self._since: float | None = None

    def progress(self, doing: str) -> None:
        """The worker has come to the next thing."""
        self._doing, self._since = doing, time.monotonic()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """From the first progress on, for the length of a `with`."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(min(1.0, self._limit_s / 4)):
            since, doing = self._since, self._doing
            if since is not None and time.monotonic() - since > self._limit_s:
                self._tell(f"hangs: no progress for {self._limit_s:.0f} s while {doing}; ended, to resume")
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                time.sleep(1.0)  # for the line to leave this process
                os._exit(_EXIT_CODE)  # a hanging collective cannot be interrupted
