"""How far a command is: bars on a terminal; in a log or a pipe, where a bar appears only once it is full, lines."""

import math
import threading
import time
from datetime import timedelta
from types import TracebackType

from rich import progress
from rich.console import Console

from pipelines.wording import counted

_PRINT_EVERY_S = 30.0


class Progress:
    """Shows tasks for the length of a `with`.

    Where the console is no terminal, it prints a line such as "kitti: verifying: 3 of 9 pairs, 10.3 s a pair, 0:01:02
    left" at the first news, later at most one in 30 seconds for all tasks together, and one at the end unless an
    exception ends the `with`.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[pace]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._lock = threading.Lock()
        self._unprinted = ""
        self._printed_at = -math.inf

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()
        if kind is None and self._unprinted:
            print_line(self._console, self._unprinted)

    def task(self, title: str, at_first: str | None = None) -> "Task":
        """A task that is called `at_first`, if given, until it is known how much there is to do."""
        return Task(self, title, self._bars.add_task(title if at_first is None else at_first, total=None, pace=""))

    def counting(self, title: str, total: int | None) -> "Task":
        """A task of so many pairs, of which none is done. `total` is None if it is unknown."""
        task = self.task(title)
        task.show(0, total)
        return task

    def _show(self, task: "Task", done: int, total: int | None, now: float, pace: str) -> None:
        """Needs the lock."""
        self._bars.update(task.bar, description=task.title, completed=done, total=total, pace=pace)
        if self._console.is_terminal:
            return
        known = counted(done, "pair") if total is None else f"{done:,} of {counted(total, 'pair')}"
        self._unprinted = f"{task.title}: {known}" + (f", {pace}" if pace else "")
        if now - self._printed_at >= _PRINT_EVERY_S:
            print_line(self._console, self._unprinted)
            self._unprinted, self._printed_at = "", now


class Task:
    """One task of a `Progress`, which makes it. Threads may call it."""

    def __init__(self, shown_in: Progress, title: str, bar: progress.TaskID) -> None:
        self.title = title
        self.bar = bar
        self._progress = shown_in
        self._pace = Pace()
        self._done = 0
        self._total: int | None = None

    def show(self, done: int, total: int | None) -> None:
        """So many pairs are done of this total, which is None if it is unknown."""
        with self._progress._lock:
            self._show(done, total)

    def advance(self) -> None:
        """One pair more is done."""
        with self._progress._lock:
            self._show(self._done + 1, self._total)

    def _show(self, done: int, total: int | None) -> None:
        self._done, self._total = done, total
        now = time.monotonic()
        self._progress._show(self, done, total, now, self._pace.say(done, total, now))


class Pace:
    """Rate and time left, averaged over this whole run: shards finish too seldom for a shorter window."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def say(self, done: int, total: int | None, now: float) -> str:
        """Text such as "41.0 pairs/s, 0:03:20 left" or, of slow ones, "2.5 s a pair, 0:03:20 left".

        Empty until this run, not an earlier one, has finished pairs.
        """
        self._first = self._first or (done, now)
        before, began = self._first
        if done == before or now <= began:
            return ""
        rate = (done - before) / (now - began)
        left = ""
        if total is not None and done < total:
            left = f", {timedelta(seconds=round((total - done) / rate))} left"
        return (f"{rate:,.1f} pairs/s" if rate >= 1 else f"{1 / rate:,.1f} s a pair") + left


def print_line(console: Console, line: str) -> None:
    """Print text as it is: a log's line is not broken at 80 columns, so that paths in it can be copied."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
