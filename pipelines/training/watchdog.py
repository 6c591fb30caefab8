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
        tell: called with the step and what there is to say of it, before the end.
    """

    def __init__(self, limit_s: float, tell: Callable[[int, str], None]) -> None:
        self._limit_s = limit_s
        self._tell = tell
        self._now = (time.monotonic(), "starting", 0)

    def progress(self, doing: str, step: int) -> None:
        """The worker has come to the next thing."""
        self._now = (time.monotonic(), doing, step)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """For the length of a `with`."""
        self.progress("starting", 0)
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
            since, doing, step = self._now
            if time.monotonic() - since > self._limit_s:
                try:
                    self._tell(step, f"hangs: no progress for {self._limit_s:.0f} s while {doing}; ended, to resume")
                    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                    time.sleep(1.0)  # for the line to leave this process
                finally:  # also where there is nobody to tell
                    os._exit(_EXIT_CODE)  # a hanging collective cannot be interrupted
