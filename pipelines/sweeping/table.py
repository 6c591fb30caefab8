"""The sweep's result: a row for every probed setting and every trial, and which rows are on the front."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from gmflow import GMFlowConfig
from pipelines.sweeping.cost import Cost
from pipelines.sweeping.settings import Setting, Size, padded_size


@dataclass(frozen=True)
class Row:
    """A probed setting, or a trial.

    Attributes:
        name: name of the setting, or of the trial.
        phase: "probe" or "trial".
        key: identifies everything that determines its metrics.
        model: config of its model.
        status: "waiting", "running", "finished", "stopped" (early, by the scheduler) or "failed".
        reason: why it failed, or where it was stopped.
        step: training steps done; 0 in the probe.
        metrics: "val/DATA/SUBSET/METRIC" → newest value.
        cost: its cost; None before it is measured.
        choices: the other dimensions that trials differ in, such as the learning rate.
        reference: whether it is the probe of the setting that others are compared with.
        front: whether no other row is at least as good in objective, latency and memory, and better in one of them.
    """

    name: str
    phase: str
    key: str
    model: GMFlowConfig
    status: str = "waiting"
    reason: str = ""
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    cost: Cost | None = None
    choices: dict[str, float] = field(default_factory=dict)
    reference: bool = False
    front: bool = False

    @property
    def setting(self) -> Setting:
        return Setting.of(self.model)

    @property
    def point(self) -> dict[str, float]:
        """What distinguishes the row from others: dimension of the space → value."""
        return {**self.setting.point, **self.choices}

    def flat(self, cost_size: Size) -> dict[str, Any]:
        """One line of the CSV and of the JSON."""
        padded = padded_size(self.model, cost_size)
        return {
            "name": self.name,
            "phase": self.phase,
            **self.point,
            "status": self.status,
            "step": self.step,
            **(dict.fromkeys(found.name for found in fields(Cost)) if self.cost is None else asdict(self.cost)),
            **self.metrics,
            "cost_padded_to": f"{padded[0]}x{padded[1]}",
            "reference": self.reference,
            "front": self.front,
            "reason": self.reason,
        }


def mark_front(rows: Sequence[Row], metric: str) -> list[Row]:
    """The rows with `front` set. On the front are the finished rows with objective and cost that none dominates.

    Latency and memory are compared in steps of one percent.
    """
    goals = [_goals(row, metric) for row in rows]
    measured = [found for found in goals if found is not None]
    return [
        replace(row, front=mine is not None and not any(_dominates(other, mine) for other in measured))
        for row, mine in zip(rows, goals, strict=True)
    ]


def _goals(row: Row, metric: str) -> tuple[float, float, float] | None:
    """(objective, latency, memory), lower is better; None for rows that were not measured, or that did not finish."""
    if row.cost is None or metric not in row.metrics or row.status != "finished":
        return None
    return row.metrics[metric], _percent_steps(row.cost.latency_ms), _percent_steps(row.cost.peak_mib)


def _percent_steps(cost: float) -> int:
    """A cost in steps of one percent: a smaller difference is noise in a timing, and no reason to choose a setting."""
    return round(math.log(cost) / math.log(1.01))


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def best_settings(rows: Sequence[Row], metric: str) -> list[Setting]:
    """The settings of the front, best objective first."""
    front = [row for row in rows if row.front]
    return [row.setting for row in sorted(front, key=lambda row: (row.metrics[metric], row.name))]


def to_csv(rows: Sequence[Row], cost_size: Size) -> bytes:
    """A CSV with all columns that any row has; a value that a row lacks is empty."""
    lines = [row.flat(cost_size) for row in rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode()


def to_json(rows: Sequence[Row], metric: str, cost: dict[str, Any]) -> bytes:
    lines = [{**row.flat((cost["height"], cost["width"])), "model": asdict(row.model)} for row in rows]
    return json.dumps({"objective": metric, "cost": cost, "rows": lines}, indent=1).encode()
