"""Ends a worker that hangs: a lost peer in a collective, a dead mount or a bug could otherwise block it for ever."""

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

_EXIT_CODE = 70
# After this long without progress a worker says what it waits for, because all that a person sees is a table at rest.
_SLOW_S = 60.0
# How often a worker gives a sign of life: while it computes, it may send no record for long.
_LIFE_S = 30.0


class Watchdog:
    """Watches that a worker makes progress.

    Args:
        limit_s: number of seconds without progress after which the process is ended.
        tell: called with the step and a message before that, and once whenever a minute (or a quarter of the limit, if
            that is less) has brought no progress.
        live: called at once and then every half a minute, with or without progress.
    """

    def __init__(self, limit_s: float, tell: Callable[[int, str], None], live: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._tell = tell
        self._live = live
        self._now = (time.monotonic(), "starting", 0)

    def progress(self, doing: str, step: int) -> None:
        """Note that the worker has made progress, and what it does now."""
        self._now = (time.monotonic(), doing, step)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of a `with`."""
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
        slow_s = min(_SLOW_S, self._limit_s / 4)
        reported, lived = 0.0, -math.inf
        while not ended.wait(min(1.0, self._limit_s / 8)):
            if time.monotonic() - lived > _LIFE_S:
                lived = time.monotonic()
                with contextlib.suppress(Exception):  # as below
                    self._live()
            since, doing, step = self._now
            idle = time.monotonic() - since
            if idle > self._limit_s:
                self._end(doing, step)
            if idle > slow_s and reported != since:
                reported = since
                with contextlib.suppress(Exception):  # this thread has to go on, even if nobody can be told
                    self._tell(step, f"no progress for {idle:.0f} s while {doing}; is ended at {self._limit_s:.0f} s")

    def _end(self, doing: str, step: int) -> None:
        try:
            self._tell(step, f"hangs: no progress for {self._limit_s:.0f} s while {doing}; ended, to resume")
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            time.sleep(1.0)  # gives the message time to leave this process
        finally:  # even if the message cannot be sent
            os._exit(_EXIT_CODE)  # a hanging collective cannot be interrupted
