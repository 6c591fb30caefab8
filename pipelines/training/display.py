"""The display of a running curriculum: a live table on a terminal, or lines with the same figures in a log."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipelines.training.feed import Record

# The width used for a job's log, which has none.
LOG_WIDTH = 160

WAITING = "waiting for workers"
"""The state of a stage whose workers have not started yet."""


def output() -> Console:
    """A console that writes to standard output."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else LOG_WIDTH)


@dataclass
class _Row:
    steps: int
    step: int = 0
    state: str = "waiting"
    metrics: dict[str, float] = field(default_factory=dict)


class Display:
    """Shows the stages of a curriculum and the messages about them.

    Args:
        title: title of the table.
        stages: (name, steps) of each stage, in order.
        shown_sets: validation sets whose EPE gets a column, such as "sintel/training-final".
    """

    def __init__(self, title: str, stages: Sequence[tuple[str, int]], shown_sets: Sequence[str]) -> None:
        self._title = title
        self._rows = {name: _Row(steps) for name, steps in stages}
        self._sets = shown_sets
        self._console = output()
        self._live: Live | None = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Keep the table on the terminal for the length of a `with`, below the messages."""
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=self._console, refresh_per_second=2) as self._live:
            yield
        self._live = None

    def say(self, line: str) -> None:
        text = f"{datetime.now():%H:%M:%S} {line}"
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def state(self, stage: str, state: str) -> None:
        """Set what a stage is doing, in a word or two."""
        row = self._rows[stage]
        row.state = state
        if state == "finished":
            row.step = row.steps

    def record(self, stage: str, record: Record) -> None:
        """Show a record from a worker, or from the driver that waits for workers."""
        row = self._rows[stage]
        if record.waiting:
            row.state = WAITING
        else:
            row.state, row.step = "training", record.step
        row.metrics |= record.metrics
        if record.line:
            self.say(record.line)

    def _table(self) -> Table:
        table = Table(title=self._title)
        for column in ("stage", "state"):
            table.add_column(column)
        for column in ("step", "loss", "EPE", *(f"EPE {name}" for name in self._sets), "samples/s", "ETA"):
            table.add_column(column, justify="right")
        for name, row in self._rows.items():
            validated = (_number(row.metrics.get(f"val/{chosen}/epe"), 3) for chosen in self._sets)
            table.add_row(
                name,
                row.state,
                f"{row.step:,}/{row.steps:,}",
                _number(row.metrics.get("train/loss"), 3),
                _number(row.metrics.get("train/epe"), 3),
                *validated,
                _number(row.metrics.get("time/samples_per_s"), 1),
                self._left(row),
            )
        return table

    def _left(self, row: _Row) -> str:
        pace = row.metrics.get("time/step_s")
        if row.state != "training" or pace is None:
            return ""
        return str(timedelta(seconds=round((row.steps - row.step) * pace)))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
