"""Pictures of a sweep: the front, the heat map over windows and radius, and an interactive page."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipelines.sweeping.cost import Cost
from pipelines.sweeping.settings import Size
from pipelines.sweeping.table import Row

_DPI = 130
_REFERENCE = "#d62728"
_MEMORY = "peak memory, MiB"


def front_png(rows: Sequence[Row], metric: str, cost_size: Size) -> bytes:
    """Objective against latency, coloured by memory. The front is connected and named, the reference is marked.

    A line through a point spans the middle half of its timings.
    """
    shown = [row for row in rows if row.cost is not None and metric in row.metrics]
    figure = Figure(figsize=(9, 5.5), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    memory = [_cost(row).peak_mib for row in shown]
    title = f"Accuracy against latency: {_setting_title(shown)}"
    axes.hlines(
        [row.metrics[metric] for row in shown],
        [_cost(row).latency_q1_ms for row in shown],
        [_cost(row).latency_q3_ms for row in shown],
        color="silver",
        zorder=1,
        label="half of the timings",
    )
    for phase, marker in (("probe", "o"), ("trial", "D")):
        of_phase = [row for row in shown if row.phase == phase]
        if of_phase:
            points = axes.scatter(
                [_cost(row).latency_ms for row in of_phase],
                [row.metrics[metric] for row in of_phase],
                c=[_cost(row).peak_mib for row in of_phase],
                vmin=min(memory),
                vmax=max(memory) + 1e-9,
                s=[70 if row.front else 28 for row in of_phase],
                alpha=[1.0 if row.status == "finished" else 0.35 for row in of_phase],  # type: ignore[arg-type]
                cmap="viridis",
                marker=marker,
                edgecolors="black",
                linewidths=[1.5 if row.front else 0 for row in of_phase],
                label=phase,
                zorder=3,
            )
    if shown and _tell_apart(memory):
        digits = math.ceil(max(1.0, 1 - math.log10(max(memory) - min(memory))))
        figure.colorbar(points, ax=axes, label=_MEMORY, format=f"%.{digits}f")
    elif shown:
        title += f"; {_MEMORY}: {memory[0]:.1f}" + (" each" if len(memory) > 1 else "")
    front = _front_in_sight(shown, metric)
    axes.plot(
        [_cost(row).latency_ms for row in front],
        [row.metrics[metric] for row in front],
        color="grey",
        lw=1,
        label="front",
    )
    for row in (row for row in shown if row.reference):
        place = (_cost(row).latency_ms, row.metrics[metric])
        axes.scatter(*place, s=240, facecolors="none", edgecolors=_REFERENCE, lw=2, zorder=4, label="reference")
    axes.set_xlabel(_latency_title(cost_size))
    axes.set_ylabel(_title(metric))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.margins(x=0.14, y=0.1)
    if _spreads([row.metrics[metric] for row in shown]):
        axes.set_yscale("log")
    if shown:
        axes.legend(fontsize=8)
    _name(axes, front, metric, with_radius=_radius_differs(shown))
    return _png(figure)


def _front_in_sight(rows: Sequence[Row], metric: str) -> list[Row]:
    """The front if memory did not count, fastest first: each row is more accurate than all before it."""
    found: list[Row] = []
    for row in sorted((row for row in rows if row.front), key=lambda row: (_cost(row).latency_ms, row.metrics[metric])):
        if not found or row.metrics[metric] < found[-1].metrics[metric]:
            found.append(row)
    return found


def _name(axes: Any, front: Sequence[Row], metric: str, *, with_radius: bool) -> None:
    """Write names below and left of the points, where no finished row can be; skip names that would overlap."""
    axes.figure.draw_without_rendering()  # so that positions in pixels are known
    named: list[tuple[float, float]] = []
    for row in sorted(front, key=lambda row: not row.reference):
        place = (_cost(row).latency_ms, row.metrics[metric])
        x, y = axes.transData.transform(place)
        if not any(abs(x - a) < 90 and abs(y - b) < 18 for a, b in named):
            named.append((x, y))
            name = row.setting.splits
            if with_radius:
                name += f", r {_radius(row.setting.corr_radius[-1])}"
            axes.annotate(name, place, textcoords="offset points", xytext=(-8, -5), ha="right", va="top", fontsize=8)


def heat_map_png(rows: Sequence[Row], metric: str) -> bytes | None:
    """The objective over windows and radius, one panel per propagation radius; None if fewer than two are probed."""
    shown = [row for row in rows if row.phase == "probe" and metric in row.metrics]
    if len(shown) < 2:
        return None
    splits = sorted({row.setting.attn_splits for row in shown})
    radii = sorted({row.setting.corr_radius[-1] for row in shown})
    panels = sorted({row.setting.prop_radius for row in shown})
    values = [row.metrics[metric] for row in shown]
    width = 2.6 + len(panels) * max(0.85 * len(radii), 2.4)
    figure = Figure(figsize=(width, 1.8 + 0.42 * len(splits)), dpi=_DPI, layout="constrained")
    many = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, panel in zip(many, panels, strict=True):
        grid = np.full((len(splits), len(radii)), np.nan)
        for row in (row for row in shown if row.setting.prop_radius == panel):
            place = splits.index(row.setting.attn_splits), radii.index(row.setting.corr_radius[-1])
            grid[place] = row.metrics[metric]
            if row.reference:
                corner = (place[1] - 0.5, place[0] - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_REFERENCE, lw=2.5, zorder=3))
        low, high = min(values), max(values) + 1e-9
        norm = LogNorm(low, high) if _spreads(values) else Normalize(low, high)
        image = axes.imshow(grid, aspect="auto", cmap="viridis_r", norm=norm)
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "white" if norm(value) > 0.5 else "black"
                weight = "bold" if value == min(values) else "normal"
                axes.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour, fontsize=8, fontweight=weight)
        axes.set_xticks(range(len(radii)), [_radius(radius) for radius in radii])
        axes.set_yticks(range(len(splits)), ["×".join(map(str, chosen)) for chosen in splits])
        axes.set_xlabel("matching radius" + (f" (propagation {panel[-1]})" if len(panels) > 1 else ""))
    many[0].set_ylabel("windows on a side, coarse×fine")
    figure.colorbar(image, ax=many.tolist(), label=_title(metric))
    figure.suptitle("lower is better; the best is bold, the reference framed in red", fontsize=9)
    return _png(figure)


def front_html(rows: Sequence[Row], metric: str, cost_size: Size, name: str) -> bytes:
    """A page that needs no other file: points to hover over, axes to choose, a table to sort.

    It draws its own SVG in a few lines: an inlined plotting library would be 300 times the size of the page.
    """
    data = {
        "name": name,
        "metric": metric,
        "size": f"{cost_size[0]}×{cost_size[1]}",
        "titles": _titles(rows, cost_size),
        "rows": [row.flat(cost_size) for row in rows],
    }
    text = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    template = Path(__file__).with_name("front.html").read_text()
    return template.replace("/*DATA*/null", text).encode()


def _spreads(values: Sequence[float]) -> bool:
    """Whether a logarithmic scale is needed to tell the good ones apart."""
    return bool(values) and min(values) > 0 and max(values) > 6 * min(values)


def _cost(row: Row) -> Cost:
    assert row.cost is not None
    return row.cost


def _tell_apart(values: Sequence[float]) -> bool:
    """Whether any two differ by a percent or more, as costs must for the front to tell them apart."""
    return max(values) > 1.01 * min(values)


def _radius_differs(rows: Sequence[Row]) -> bool:
    """Whether rows differ in the radius: one of a model without refinement is always global, and says nothing."""
    return len({row.setting.corr_radius[-1] for row in rows}) > 1


def _setting_title(rows: Sequence[Row]) -> str:
    """What the names of points consist of, such as "windows (coarse×fine), radius"."""
    scales = " (coarse×fine)" if any(len(row.setting.attn_splits) > 1 for row in rows) else ""
    return f"windows{scales}" + (", radius r" if _radius_differs(rows) else "")


def _titles(rows: Sequence[Row], cost_size: Size) -> dict[str, str]:
    """Column of the table → the words for it in the other pictures."""
    many = max((len(row.setting.attn_splits) for row in rows), default=1) > 1
    windows = ("windows, coarse", "windows, fine") if many else ("windows",)
    return {
        "latency_ms": _latency_title(cost_size),
        "latency_q1_ms": "lower quartile, ms",
        "latency_q3_ms": "upper quartile, ms",
        "peak_mib": _MEMORY,
        **{f"attn_splits_{scale}": title for scale, title in enumerate(windows, start=1)},
        "corr_radius": "matching radius",
        "prop_radius": "propagation radius",
        "peak_lr": "peak learning rate",
        "cost_padded_to": "padded to",
        **{name: _title(name) for row in rows for name in row.metrics},
    }


def _latency_title(cost_size: Size) -> str:
    return f"latency of a pair at {cost_size[0]}×{cost_size[1]}, ms"


def _radius(value: int) -> str:
    return "all" if value == -1 else str(value)


def _title(metric: str) -> str:
    _, data, subset, name = metric.split("/")
    unit = "EPE, px" if name == "epe" else name
    return f"{unit} ({data} {subset})"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
