"""What is on the front, and the report."""

import csv
import io
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection, PathCollection

from gmflow import GMFlowConfig
from pipelines.sweeping import plots
from pipelines.sweeping.settings import Setting
from pipelines.sweeping.table import Row, best_settings, mark_front, to_csv, to_json
from pipelines.sweeping.view import front_table
from tests.pipelines.sweeping.made import METRIC, REFINE, row


@settings(deadline=None)  # a shared machine is no reason to fail
@given(st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=12))
def test_the_front_holds_what_nothing_beats_and_something_on_it_beats_the_rest(goals):
    rows = mark_front([row(str(number), *map(float, found)) for number, found in enumerate(goals)], METRIC)
    front = [found for found, marked in zip(goals, rows, strict=True) if marked.front]
    assert front
    for found, marked in zip(goals, rows, strict=True):
        beaten = [b for b in goals if all(np.less_equal(b, found)) and any(np.less(b, found))]
        assert marked.front == (not beaten)
        assert marked.front or any(b in front for b in beaten)


def test_costs_closer_than_a_percent_are_the_same_cost():
    rows = mark_front(
        [row("better", 1.0, 100.2, 50.1), row("worse", 1.1, 100.0, 50.0), row("fast", 1.2, 90, 50)], METRIC
    )
    assert [one.front for one in rows] == [True, False, True]


def test_the_front_takes_only_what_was_measured_to_the_end():
    best = row("stopped", 0.1, 1, 1)
    rows = [replace(best, status="stopped"), replace(best, cost=None), replace(best, metrics={}), row("only", 5, 9, 9)]
    assert [one.front for one in mark_front(rows, METRIC)] == [False, False, False, True]


def test_the_probes_best_are_the_fronts_by_objective():
    other = replace(REFINE, attn_splits=(1, 4))
    rows = mark_front([row("slow", 1, 9, 1), replace(row("fast", 2, 3, 1), model=other), row("bad", 3, 9, 9)], METRIC)
    assert best_settings(rows, METRIC) == [Setting.of(REFINE), Setting.of(other)]
    assert best_settings(rows, METRIC)[:1] == [Setting.of(REFINE)]


def test_the_report_holds_every_row_and_needs_no_network():
    failed = Row("broken", "trial", "k", REFINE, "failed", reason="loss is </script> nan", choices={"peak_lr": 0.1})
    rows = [*mark_front([row("a", 1, 9, 1), row("b", 2, 3, 1, reference=True)], METRIC), failed]
    lines = list(csv.DictReader(io.StringIO(to_csv(rows, (436, 1024)).decode())))
    assert [line["name"] for line in lines] == ["a", "b", "broken"]
    assert [line["peak_lr"] for line in lines] == ["", "", "0.1"]
    assert [line["reference"] for line in lines] == ["False", "True", "False"]
    assert lines[2]["reason"] == failed.reason
    assert lines[0][METRIC] == "1"
    assert lines[0]["cost_padded_to"] == "448x1024"
    first = json.loads(to_json(rows, METRIC, {"height": 436, "width": 1024}))["rows"][0]
    assert (first["latency_ms"], first["peak_mib"], first["cost_padded_to"]) == (9, 1, "448x1024")
    page = plots.front_html(rows, METRIC, (436, 1024), "x").decode()
    assert page.count("</script>") == 1
    assert "broken" in page
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import", page)
    assert len(page) < 50_000


def test_costs_more_than_a_percent_apart_differ():
    rows = mark_front([row("a", 1.0, 106, 50), row("b", 1.1, 103, 50), row("c", 1.2, 100, 50)], METRIC)
    assert [one.front for one in rows] == [True] * 3


def test_pictures_show_the_front_and_choose_their_scales():
    found = [row("a", 1.0, 9, 9), row("b", 2.0, 5, 5), row("c", 3.0, 6, 1), row("d", 2.0, 6, 2)]
    rows = mark_front(found, METRIC)
    assert [one.name for one in plots._front_in_sight(rows, METRIC)] == ["b", "a"]
    assert plots.heat_map_png(rows[:1], METRIC) is None
    assert plots._spreads([1.0, 7.0])
    assert not plots._spreads([1.0, 5.0])
    assert not plots._spreads([0.0, 7.0])


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The figures that the plots make."""
    figures: list[Any] = []
    monkeypatch.setattr(plots, "_png", figures.append)
    return figures


def test_the_front_names_a_radius_only_where_radii_differ(drawn):
    base = GMFlowConfig(attn_splits=(4,))
    whole = replace(REFINE, corr_radius=(-1, -1))
    for models in ([base, base], [REFINE, whole]):
        rows = [replace(row(str(n), 2 - n, 1 + n, 5 + n), model=model) for n, model in enumerate(models)]
        plots.front_png(mark_front(rows, METRIC), METRIC, (436, 1024))
    names, others = ({text.get_text() for text in figure.axes[0].texts} for figure in drawn)
    assert names == {"4"}
    assert others == {"2×8, r 4", "2×8, r all"}
    assert [figure.axes[0].get_title() for figure in drawn] == [
        "Accuracy against latency: windows",
        "Accuracy against latency: windows (coarse×fine), radius r",
    ]


def test_a_line_through_a_point_spans_the_middle_half_of_its_timings(drawn):
    rows = mark_front([row("a", 1, 8, 1), row("b", 2, 4, 2)], METRIC)
    plots.front_png(rows, METRIC, (436, 1024))
    (lines,) = (found for found in drawn[0].axes[0].collections if isinstance(found, LineCollection))
    assert [line.tolist() for line in lines.get_segments()] == [[[6.0, 1.0], [12.0, 1.0]], [[3.0, 2.0], [6.0, 2.0]]]


@pytest.mark.parametrize(("memory", "bar"), [((4.3, 4.3), False), ((4.3, 4.31), False), ((4.3, 4.4), True)])
def test_a_colour_bar_has_different_ticks_or_is_left_out(drawn, memory, bar):
    rows = mark_front([row(str(n), 2 - n, 1 + n, mib) for n, mib in enumerate(memory)], METRIC)
    plots.front_png(rows, METRIC, (436, 1024))
    (figure,) = drawn
    figure.draw_without_rendering()
    assert len(figure.axes) == 1 + bar
    assert ("peak memory, MiB: 4.3 each" in figure.axes[0].get_title()) == (not bar)
    for axes in figure.axes[1:]:
        ticks = [tick.get_text() for tick in axes.get_yticklabels()]
        assert len(set(ticks)) == len(ticks) > 1


def test_the_page_has_the_pictures_words(drawn):
    rows = mark_front([row("a", 1, 9, 1), row("b", 2, 3, 2)], METRIC)
    plots.front_png(rows, METRIC, (436, 1024))
    axes, bar = drawn[0].axes
    page = plots.front_html(rows, METRIC, (436, 1024), "x").decode()
    (line,) = (line for line in page.splitlines() if line.startswith("const data = "))
    titles = json.loads(line.removeprefix("const data = ").removesuffix(";"))["titles"]
    wanted = (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel())
    assert wanted == tuple(titles[name] for name in ("latency_ms", METRIC, "peak_mib"))
    assert (titles["attn_splits_1"], titles["attn_splits_2"]) == ("windows, coarse", "windows, fine")


def test_the_reference_is_shown_beside_the_front():
    rows = mark_front([row("a", 1, 1, 1), row("b", 2, 2, 2, reference=True), row("c", 3, 3, 3)], METRIC)
    assert front_table(rows, METRIC, "x").row_count == 2


def test_the_heat_map_has_each_probe_in_its_place_and_no_trials(drawn):
    probed = {  # (windows, matching radius, propagation radius) → EPE
        ("1×8", 2, 1): 3.0,
        ("1×8", 4, 1): 2.5,
        ("2×8", 4, 1): 2.0,
        ("1×8", 2, 2): 2.75,
        ("2×8", -1, 2): 2.25,
    }
    rows = []
    for (windows, corr, prop), epe in probed.items():
        splits = tuple(map(int, windows.split("×")))
        model = replace(REFINE, attn_splits=splits, corr_radius=(-1, corr), prop_radius=(-1, prop))
        rows.append(replace(row(windows, epe, 1, 1, reference=epe == 2.5), model=model))
    plots.heat_map_png([replace(rows[0], phase="trial", metrics={METRIC: 0.5}), *rows], METRIC)
    (figure,) = drawn
    shown, bold, framed = {}, [], []
    windows = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    for axes, prop in zip(figure.axes, (1, 2), strict=False):
        assert axes.get_xlabel() == f"matching radius (propagation {prop})"
        radii = [tick.get_text() for tick in axes.get_xticklabels()]
        for text in axes.texts:
            x, y = text.get_position()
            shown[windows[y], radii[x], prop] = text.get_text()
            if text.get_fontweight() == "bold":
                bold.append(text.get_text())
        for patch in axes.patches:
            x, y = patch.get_center()
            framed.append((windows[int(y)], radii[int(x)], prop))
    assert shown == {(w, "all" if r == -1 else str(r), p): f"{epe:.3f}" for (w, r, p), epe in probed.items()}
    assert (bold, framed) == (["2.000"], [("1×8", "4", 1)])


def test_the_front_shows_whatever_was_measured_and_names_the_reference_first(drawn):
    metric = "val/chairs/val/px1"
    found = [("a", "probe", 2.0, 10.0), ("b", "probe", 1.99, 10.2), ("c", "trial", 1.0, 99.0)]
    rows = [replace(row(name, 0, ms, 1), phase=phase, metrics={metric: px1}) for name, phase, px1, ms in found]
    rows[1] = replace(rows[1], reference=True, model=replace(REFINE, attn_splits=(4, 8)))
    rows += [replace(rows[0], cost=None), replace(rows[0], metrics={}), Row("waits", "trial", "k", REFINE)]
    plots.front_png(mark_front(rows, metric), metric, (436, 1024))
    axes, *_ = drawn[0].axes
    scattered = [found for found in axes.collections if isinstance(found, PathCollection)]
    places = [tuple(place) for points in scattered for place in points.get_offsets().tolist()]
    assert places == [(10.0, 2.0), (10.2, 1.99), (99.0, 1.0), (10.2, 1.99)], "the reference has a ring around it"
    assert {text.get_text() for text in axes.texts} == {"4×8", "2×8"}
    assert len(axes.texts) == 2, "the name of a point beside the reference would be written over its name"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency of a pair at 436×1024, ms", "px1 (chairs val)")
