"""A report as one self-contained HTML file, which opens anywhere and needs no network.

The code here only collects the data; `report_page.html` draws it.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_etl.evaluation_set import EvaluationSet
from gmflow import GMFlowConfig
from gmflow.visualize import KITTI_BANDS
from pipelines.gallery import Card, badness
from pipelines.published import NOTE, published_figures
from pipelines.scoring import Evaluation

FIGURES = {
    "epe": "EPE",
    "px1": "1px, %",
    "px3": "3px, %",
    "px5": "5px, %",
    "s0_10": "s0-10",
    "s10_40": "s10-40",
    "s40_plus": "s40+",
    "matched": "matched",
    "unmatched": "unmatched",
    "f1_all": "F1-all, %",
    "wauc": "WAUC, %",
    "epe_per_image": "EPE per image",
}
"""Metric → the name by which people know it."""

_POINTS = 400  # at most, in each curve
_WORST = 12
_FIGURE_DECIMALS = 3

Cell = str | float | None | dict[str, float | None]
"""A text, a figure, or a figure beside the published one: {"value": …, "published": …}."""


@dataclass(frozen=True)
class Table:
    """A title, column names, and rows of as many cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """Lines over steps: name → (step, value), and the steps at which a new stage begins."""

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    boundaries: Sequence[float] = ()


@dataclass(frozen=True)
class Report:
    """Everything that the page shows; parts that are empty are left out.

    Attributes:
        title, subtitle: headings of the page.
        facts: lineage, as names and values.
        tables: tables of figures.
        curves: values over steps.
        cards: the gallery.
        worst: rows of the worst pairs, as `worst_pairs` makes them.
        speed: rows of times and memory; the first row holds the names of the columns.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    curves: Sequence[Curve] = ()
    cards: Sequence[Card] = ()
    worst: Sequence[Sequence[Cell]] = ()
    speed: Sequence[Sequence[Cell]] = ()

    def to_html(self) -> str:
        """The whole page, with pictures and script inside."""
        content = {
            "title": self.title,
            "subtitle": self.subtitle,
            "facts": self.facts,
            "tables": [{**vars(table), "decimals": _decimals(table.rows)} for table in self.tables],
            "curves": [_curve(curve) for curve in self.curves],
            "cards": [_card(card) for card in self.cards],
            "worst": {"rows": self.worst, "decimals": _decimals(self.worst)},
            "speed": {"rows": self.speed, "decimals": _decimals(self.speed[1:])},
            "figure_decimals": _FIGURE_DECIMALS,
            "error_scale": _error_scale(),
            "figure_names": FIGURES,
        }
        # The JSON is inside an HTML element, so nothing in it may look like the end of that element.
        data = json.dumps(without_nan(content), ensure_ascii=False).replace("<", "\\u003c")
        page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
        return page.replace("@@DATA@@", data)


Sets = Mapping[str, tuple[EvaluationSet, Evaluation]]
"""What was scored, by the names of the sets."""


def figures_table(config: GMFlowConfig, sets: Sets) -> Table:
    """One row per set, with the paper's figures beside ours if it has some."""
    names = [name for name in FIGURES if any(name in evaluation.pooled for _, evaluation in sets.values())]
    rows: list[list[Cell]] = []
    any_published = False
    for title, (scored, evaluation) in sets.items():
        theirs = published_figures(config, scored.manifest.dataset, scored.subset, len(scored))
        any_published = any_published or bool(theirs)
        cells = [figure_cell(evaluation.pooled.get(name), theirs.get(name)) for name in names]
        rows.append([title, len(scored), *cells])
    columns = ["set", "pairs", *(FIGURES[name] for name in names)]
    return Table("Pooled over every valid pixel", columns, rows, NOTE if any_published else "")


def figure_cell(value: float | None, published: float | None) -> Cell:
    """A figure, beside the published one if there is one."""
    return value if published is None else {"value": value, "published": published}


def scene_tables(sets: Sets) -> list[Table]:
    """A table by scene, worst first, of each set that has several scenes and more pairs than scenes."""
    names = ["epe", "px1", "px3", "f1_all", "wauc"]
    columns = ["scene", *(FIGURES[name] for name in names)]
    tables = []
    for title, (scored, evaluation) in sets.items():
        if 1 < len(evaluation.scenes) < len(scored):
            scenes = sorted(evaluation.scenes.items(), key=lambda item: -badness(item[1]))
            tables.append(Table(f"{title} by scene", columns, [[s, *(f[name] for name in names)] for s, f in scenes]))
    return tables


def worst_pairs(sets: Sets) -> list[list[Cell]]:
    """Rows of the pairs with the largest EPE in all sets."""
    pairs = [(key, title, figures) for title, (_, found) in sets.items() for key, figures in found.images.items()]
    pairs.sort(key=lambda pair: -badness(pair[2]))
    return [
        [key, title, *(figures[name] for name in ("epe", "px1", "px3", "f1_all"))]
        for key, title, figures in pairs[:_WORST]
    ]


def prediction_speed(sets: Sets) -> list[list[Cell]]:
    """A row of column names, then time and memory of the predictions for each set; empty without sets."""
    header: list[Cell] = ["what", "on", "seconds a pair (median)", "pairs a second", "peak memory, MiB"]
    rows: list[list[Cell]] = [
        [f"predict {title}", found.device, found.seconds, 1 / max(found.seconds, 1e-9), found.peak_bytes / 2**20]
        for title, (_, found) in sets.items()
    ]
    return [header, *rows] if rows else []


def _decimals(rows: Sequence[Sequence[Cell]]) -> list[int]:
    """Decimals of the numbers in each column, the same down the column: of 99.993 and 100.0 JSON would make 100."""
    return [_column_decimals(column) for column in zip(*rows, strict=True)]


def _column_decimals(cells: Sequence[Cell]) -> int:
    values = [number for cell in cells for number in (cell.values() if isinstance(cell, dict) else [cell])]
    if all(isinstance(value, int) for value in values):
        return 0
    largest = max((abs(value) for value in values if isinstance(value, float) and math.isfinite(value)), default=0.0)
    return _FIGURE_DECIMALS if largest < 1000 else 1


def _curve(curve: Curve) -> dict[str, Any]:
    series = [{"name": name, "points": _thinned(points)} for name, points in curve.series.items() if points]
    return {"title": curve.title, "series": series, "boundaries": curve.boundaries}


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of consecutive points, at most as many as a screen can show."""
    group = -(-len(points) // _POINTS)
    parts = [points[start : start + group] for start in range(0, len(points), group)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _card(card: Card) -> dict[str, Any]:
    pictures = {
        name: "data:image/webp;base64," + base64.b64encode(data).decode() for name, data in card.pictures.items()
    }
    return {**vars(card), "pictures": pictures}


def _error_scale() -> list[tuple[str, str, bool]]:
    """For each error band: its upper limit, its colour, and whether that colour is dark."""
    return [
        (f"{limit:g}" if math.isfinite(limit) else "more", f"rgb({red} {green} {blue})", red + 2 * green + blue < 420)
        for limit, (red, green, blue) in KITTI_BANDS
    ]


def without_nan(value: Any) -> Any:
    """JSON has no NaN or infinity: such a figure, of no pixel or of a prediction that is not finite, becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value
