"""The display of a sweep: a live table on a terminal, plain lines in a job's log, and the front at the end."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.live import Live
from rich.table import Table

from pipelines.sweeping.table import Row
from pipelines.training.display import output

_SHOWN_ROWS = 30
_STYLES = {"running": "bold", "failed": "red", "stopped": "yellow", "finished": "green", "waiting": "dim"}


class SweepView:
    """Shows rows as they change. Callable from any thread.

    Args:
        metric: the objective, "val/DATA/SUBSET/METRIC".
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.console = output()
        self._rows: dict[str, Row] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Show the live table for the length of a `with`, if this is a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, refresh_per_second=4, get_renderable=self._table):
            yield

    def show(self, row: Row) -> None:
        """Show a row that is new or has changed; a log gets a line if the status changed."""
        with self._lock:
            before = self._rows.get(f"{row.phase} {row.name}")
            self._rows[f"{row.phase} {row.name}"] = row
        if row.status != (before.status if before else "waiting"):
            self.log(_line(row, self.metric))

    def log(self, line: str) -> None:
        """Print a line in a log only; a terminal shows the table instead."""
        if not self.console.is_terminal:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line; on a terminal it appears above the table."""
        self.console.print(f"{datetime.now():%H:%M:%S} {line}", markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        with self._lock:
            rows = list(self._rows.values())
        counts = {status: sum(row.status == status for row in rows) for status in _STYLES}
        table = Table(title=", ".join(f"{count} {status}" for status, count in counts.items() if count))
        for name in ("phase", "name", "status"):
            table.add_column(name)
        for name in ("step", self.metric.removeprefix("val/"), "ms", "MiB"):
            table.add_column(name, justify="right")
        table.add_column("why", overflow="ellipsis", no_wrap=True)
        # Order: running, ended, waiting rows. A terminal shows only as many as fit.
        order = sorted(rows, key=lambda row: (row.status != "running", row.status == "waiting"))
        room = min(_SHOWN_ROWS, max(self.console.height - 8, 3))
        for row in order[:room]:
            cost = ("", "") if row.cost is None else (f"{row.cost.latency_ms:.0f}", f"{row.cost.peak_mib:.0f}")
            cells = (row.phase, row.name, row.status, str(row.step or ""), _figure(row, self.metric), *cost, row.reason)
            table.add_row(*cells, style=_STYLES[row.status])
        if len(order) > room:
            table.caption = f"and {len(order) - room} more"
        return table


def _figure(row: Row, metric: str) -> str:
    return f"{row.metrics[metric]:.3f}" if metric in row.metrics else ""


def _line(row: Row, metric: str) -> str:
    parts = [f"{row.phase} {row.name} {row.status}"]
    if row.step:
        parts.append(f"step={row.step}")
    if metric in row.metrics:
        parts.append(f"{metric.removeprefix('val/')}={row.metrics[metric]:.3f}")
    if row.reason:
        parts.append(f"({row.reason})")
    return " ".join(parts)


def front_table(rows: Sequence[Row], metric: str, size: str) -> Table:
    """A table of the front and the reference, best objective first."""
    shown = sorted((row for row in rows if row.front or row.reference), key=lambda row: row.metrics.get(metric, 1e9))
    speeds = [f"{metric.rpartition('/')[0]}/{name}" for name in ("s0_10", "s10_40", "s40_plus")]
    table = Table(title=f"Pareto front: {metric.removeprefix('val/')} × latency × memory at {size}")
    table.add_column("phase")
    table.add_column("windows")
    for name in ("radius", "prop", metric.rpartition("/")[2], *(name.rpartition("/")[2] for name in speeds)):
        table.add_column(name, justify="right")
    for name in ("ms", "MiB"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in shown:
        marks = [mark for mark, holds in (("front", row.front), ("reference", row.reference)) if holds]
        cost = ("", "") if row.cost is None else (f"{row.cost.latency_ms:.0f}", f"{row.cost.peak_mib:.1f}")
        table.add_row(
            row.phase if row.phase == "probe" else row.name,
            row.setting.splits,
            str(row.setting.corr_radius[-1]),
            str(row.setting.prop_radius[-1]),
            *(_figure(row, name) for name in (metric, *speeds)),
            *cost,
            ", ".join(marks),
            style="bold" if row.reference else None,
        )
    return table
