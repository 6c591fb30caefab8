"""The report in a real browser: it draws everything, the gallery works, a phone can read it, nothing is asked of a
network.
"""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import pipelines.report
from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.manifest import Manifest
from datasets_etl.sources import EXPECTED_COUNTS
from datasets_etl.synthetic import synthetic_pair
from gmflow import GMFlowConfig
from gmflow.metrics import FlowMetrics
from pipelines.gallery import Gallery, card_pictures
from pipelines.published import published_figures
from pipelines.report_page import (
    FIGURES,
    Curve,
    Report,
    Table,
    figure_cell,
    figures_table,
    scene_tables,
    without_nan,
    worst_pairs,
)
from pipelines.training import mlflow_client, tracking
from pipelines.training.validation import Scored

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def scored(number: int, error: float) -> Scored:
    """A synthetic pair predicted with this error in pixels everywhere."""
    sample = synthetic_pair(number, 48, 64)
    assert sample.flow is not None
    assert sample.valid is not None
    truth = torch.from_numpy(sample.flow.transpose(2, 0, 1).copy())  # [2, H, W]
    flow = truth.clone()
    flow[0] += error
    metrics = FlowMetrics()
    metrics.update(flow[None], truth[None], torch.from_numpy(sample.valid)[None])
    return Scored(sample, flow, torch.zeros(48, 64, dtype=torch.bool), metrics, 0.1)


def without_truth(number: int) -> Scored:
    """A pair of which no pixel's flow is known."""
    pair = scored(number, 0.0)
    assert pair.sample.valid is not None
    return replace(pair, sample=replace(pair.sample, valid=np.zeros_like(pair.sample.valid)), metrics=FlowMetrics())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every part, and names that would break out of careless HTML."""
    cards = []
    for name, errors in (("sintel/training-clean", (0.5, 4.0, 2.0)), ("kitti/training", (8.0, 1.0))):
        gallery = Gallery.of(name, len(errors), 4)
        for number, error in enumerate(errors):
            gallery.offer(number, scored(number, error))
        cards += gallery.cards()
    steps = [(float(step), 10 / (step + 1)) for step in range(1000)]
    report = Report(
        title="A </script><b>title</b>",
        subtitle="a subtitle",
        facts=[("model", "models:/gmflow/1 " + "x" * 200)],
        tables=[
            Table("t", ["set", "EPE", "F1-all, %"], [["sintel", figure_cell(1.25, 1.084), float("nan")]], "a note"),
            Table("wide", [f"column {n}" for n in range(14)], [["set", *map(float, range(13))]]),
        ],
        curves=[
            Curve("Training loss", {"chairs": steps[:600], "things": steps[600:]}, [600.0]),
            Curve("Validation EPE", {"one": [(5.0, 1.0)]}),
        ],
        cards=cards,
        worst=[["key", "set", 8.0, 1.0, 2.0, 3.0]],
        speed=[["what", "on"], ["predict", "CPU"]],
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.to_html())
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser test")
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium): no browser test")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


class Visit:
    """A page opened at a width, and all it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, width: int) -> None:
        self.tab = browser.new_page(viewport={"width": width, "height": 800})
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("footer")

    def keys(self) -> list[str]:
        found: list[str] = self.tab.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.key)")
        return found

    def epes(self) -> list[float]:
        texts = self.tab.eval_on_selector_all(".card b", "found => found.map(b => b.textContent)")
        return [float(text.removesuffix(" px")) for text in texts]


@pytest.fixture(params=[1280, 390], ids=["desktop", "phone"])
def visit(browser: Any, page: Path, request: pytest.FixtureRequest) -> Iterator[Visit]:
    opened = Visit(browser, page, request.param)
    yield opened
    if folder := os.environ.get("GMFLOW_SCREENSHOTS"):
        opened.tab.screenshot(path=f"{folder}/{request.node.name}.png", full_page=True)
    opened.tab.close()


def test_everything_is_drawn_without_a_complaint_or_a_network(visit: Visit, page: Path):
    tab = visit.tab
    assert tab.title() == "A </script><b>title</b>"
    assert tab.locator("h2").all_text_contents() == [
        *("Figures", "Learning curves", "Gallery", "Worst cases", "Speed and memory", "Lineage")
    ]
    assert tab.locator("td .published").all_text_contents() == ["published 1.084"]
    assert "–" in tab.locator("tbody tr").first.text_content()  # the NaN
    assert tab.locator(".chart").count() == 2
    assert tab.locator(".chart polyline").count() == 3
    points = tab.locator(".chart polyline").first.get_attribute("points")
    assert 100 < len(points.split()) <= 400
    assert "NaN" not in tab.content()
    assert visit.complaints == []
    assert all(url.startswith(("file://", "data:", "blob:")) for url in visit.requests)
    assert [url for url in visit.requests if url.startswith("file://")] == [page.as_uri()]


def test_nothing_is_wider_than_the_screen_but_tables_that_scroll(visit: Visit):
    width = visit.tab.viewport_size["width"]
    assert visit.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert float(visit.tab.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")) >= 16


def test_the_gallery_sorts_filters_and_searches(visit: Visit):
    tab = visit.tab
    assert visit.epes() == [8.0, 4.0, 2.0, 1.0, 0.5]
    tab.select_option("[name=order]", "smallest EPE")
    assert visit.epes() == [0.5, 1.0, 2.0, 4.0, 8.0]
    tab.select_option("[name=set]", "kitti/training")
    assert visit.epes() == [1.0, 8.0]
    tab.fill("[name=most]", "3")
    assert visit.epes() == [1.0]
    assert tab.text_content("#count") == "1 of 5 pairs"
    tab.select_option("[name=set]", "all sets")
    tab.fill("[name=least]", "0.9")
    assert visit.epes() == [1.0, 2.0]
    tab.fill("[name=text]", "no such scene")
    assert visit.keys() == []
    assert visit.complaints == []


def test_a_prediction_that_is_not_finite_leads_the_gallery_and_no_truth_ends_it(browser: Any, tmp_path: Path):
    gallery = Gallery.of("s", 3, 6)
    for number, one in enumerate([scored(0, 50.0), without_truth(1), scored(2, math.nan)]):
        gallery.offer(number, one)
    fine, unknown, wrong = (scored(number, 0.0).sample.key for number in range(3))
    path = tmp_path / "report.html"
    path.write_text(Report("t", "s", cards=gallery.cards()).to_html())
    visit = Visit(browser, path, 1280)
    assert visit.keys() == [wrong, fine, unknown]
    visit.tab.fill("[name=least]", "60")
    assert visit.keys() == [wrong]
    visit.tab.close()


def test_every_picture_of_the_gallery_loads(visit: Visit):
    tab = visit.tab
    for kind in ("truth", "error", "frame 0", "prediction"):
        tab.select_option("[name=kind]", kind)
        tab.eval_on_selector_all(".card img", "images => images.forEach(image => image.loading = 'eager')")
        loaded = (
            "[...document.querySelectorAll('.card img')].every(image => image.complete && image.naturalWidth == 64)"
        )
        tab.wait_for_function(loaded)


def drawn(browser: Any, tmp_path: Path, width: int, **parts: Any) -> Visit:
    (tmp_path / "report.html").write_text(Report(title="t", subtitle="s", **parts).to_html())
    return Visit(browser, tmp_path / "report.html", width)


def test_sintels_figures_fit_on_a_desktops_screen(browser: Any, tmp_path: Path):
    """With the most columns there are, and the paper's figures beside ours, nothing needs to be scrolled to."""
    sets = ["sintel/training-clean", "sintel/training-final"]
    beside = ("epe", "s0_10", "s10_40", "s40_plus")
    row = [figure_cell(97.564, 108.084) if name in beside else 99.993 for name in FIGURES]
    table = Table("t", ["set", "pairs", *FIGURES.values()], [[name, 1041, *row] for name in sets])
    tab = drawn(browser, tmp_path, 1280, tables=[table]).tab
    table_of_figures = tab.locator(".scroll").first
    wide, room = (table_of_figures.evaluate(f"node => node.{name}Width") for name in ("scroll", "client"))
    assert wide <= room


def test_a_columns_figures_have_as_many_decimals_as_each_other(browser: Any, tmp_path: Path):
    rows: list[list[Any]] = [
        ["a", 1, 100.0, figure_cell(108.123, 7.0)],
        ["b", 1041, 99.993, 97.564],
        ["c", 2, None, 0.0],
    ]
    table = Table("t", ["set", "pairs", "1px, %", "EPE"], rows)
    speed = [["what", "pairs a second", "MiB"], ["a", 120.5, 1100.24], ["b", 80.25, 900.0]]
    tab = drawn(browser, tmp_path, 1280, tables=[table], speed=speed, worst=[["k", "s", 8.0, 100.0, 2.0, 3.0]]).tab
    shown = [
        cells.split("|")
        for cells in tab.eval_on_selector_all(
            "tbody tr",
            "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.replace('\\n', ' ')).join('|'))",
        )
    ]
    assert shown == [
        ["a", "1", "100.000", "108.123 published 7.000"],
        ["b", "1,041", "99.993", "97.564"],
        ["c", "2", "–", "0.000"],
        ["k", "s", "8.000", "100.000", "2.000", "3.000"],
        ["a", "120.500", "1100.2"],
        ["b", "80.250", "900.0"],
    ]


def test_a_pair_opens_flickers_and_leads_to_the_next(visit: Visit):
    tab = visit.tab
    tab.locator(".card").first.click()
    first = tab.text_content("#viewer-title")
    assert tab.locator("#viewer figcaption").all_text_contents() == [
        *("frame 0", "frame 1", "frame 1 warped", "truth", "prediction", "error"),
        *("occlusion", "occlusion found"),
    ]
    source = tab.get_attribute("#viewer figure img", "src")
    tab.click("#flicker")
    tab.wait_for_function("before => document.querySelector('#viewer figure img').src != before", arg=source)
    tab.click("#flicker")
    assert tab.get_attribute("#viewer figure img", "src") == source
    tab.keyboard.press("ArrowRight")
    assert tab.text_content("#viewer-title") != first
    tab.click("#previous")
    assert tab.text_content("#viewer-title") == first
    tab.click("#close")
    assert not tab.locator("#viewer").is_visible()
    assert visit.complaints == []


def test_curves_tell_their_values(visit: Visit):
    visit.tab.locator(".chart svg").first.hover()
    assert visit.tab.locator(".readout").first.text_content().startswith("step ")


def test_a_gallery_keeps_the_worst_and_some_spread_evenly_in_any_order_of_joining():
    errors = [float(n % 7) + n / 100 for n in range(40)]
    whole = Gallery.of("s", 40, 8)
    halves = [Gallery.of("s", 40, 8), Gallery.of("s", 40, 8)]
    for number, error in enumerate(errors):
        one = scored(0, error)
        whole.offer(number, one)
        halves[number % 2].offer(number, one)
    halves[1].join(halves[0])
    found = [(round(card.figures["epe"], 2), card.worst) for card in whole.cards()]
    assert found == [(round(card.figures["epe"], 2), card.worst) for card in halves[1].cards()]
    regular = {0, 10, 20, 30}
    assert [epe for epe, worst in found if worst] == sorted((round(e, 2) for e in errors), reverse=True)[:4]
    chosen = {round(errors[n], 2) for n in regular}
    assert max(chosen) == 6.2, "which is one of the worst too"
    assert {epe for epe, _ in found} >= chosen


def test_a_set_of_which_every_pair_is_shown_has_its_worst():
    gallery = Gallery.of("s", 3, 8)
    for number, error in enumerate((2.0, 3.0, 1.0)):
        gallery.offer(number, scored(0, error))
    small = Gallery.of("s", 6, 4)
    for number, error in enumerate((9.0, 3.0, 1.0, 2.0, 5.0, 4.0)):
        small.offer(number, scored(0, error))
    assert [card.figures["epe"] for card in gallery.cards() if card.worst] == pytest.approx([3.0, 2.0, 1.0])
    assert [card.figures["epe"] for card in small.cards() if card.worst] == pytest.approx([9.0, 5.0])


@pytest.mark.parametrize("errors", [[np.nan, 1.0, 50.0], [np.nan, np.nan], [2.0, 2.0, 2.0]])
def test_which_pairs_are_the_worst_does_not_depend_on_how_a_set_is_divided(errors: list[float]):
    """Nor on a pair without a valid pixel, which has no error."""
    whole, *parts = [Gallery("s", frozenset(), 1) for _ in range(1 + len(errors))]
    for number, (error, part) in enumerate(zip(errors, parts, strict=True)):
        one = without_truth(number) if np.isnan(error) else scored(number, error)
        whole.offer(number, one)
        part.offer(number, one)
    for part in parts[1:]:
        parts[0].join(part)
    (card,), (joined,) = whole.cards(), parts[0].cards()
    assert card.key == joined.key
    assert card.figures["epe"] == pytest.approx(np.nanmax(errors) if np.isfinite(errors).any() else np.nan, nan_ok=True)


def test_pictures_of_sparse_truth_keep_every_point_when_they_shrink():
    big = synthetic_pair(1, 48, 64)
    flow = np.full((300, 1200, 2), 5, np.float32)
    valid = np.zeros((300, 1200), np.bool_)
    valid[::10, ::10] = True
    frame = np.zeros((300, 1200, 3), np.uint8)
    sample = type(big)("k", "kitti", "training", True, frame, frame, flow * valid[..., None], valid)
    pictures = card_pictures(Scored(sample, torch.zeros(2, 300, 1200), None, FlowMetrics(), 0.0))
    error = cv2.imdecode(np.frombuffer(pictures["error"], np.uint8), cv2.IMREAD_COLOR)
    assert error.shape[1] == 512
    assert (error.max(axis=2) > 60).mean() > 0.04  # one point in 100, grown to nine pixels


def test_published_figures_are_for_the_published_variants_only():
    assert published_figures(GMFlowConfig.refine(), "sintel", "training-clean", 1041)["epe"] == 1.084
    assert published_figures(GMFlowConfig.base(), "sintel", "training-clean", 1041)["s40_plus"] == 8.257
    assert published_figures(GMFlowConfig(attn_splits=(4,)), "sintel", "training-clean", 1041) == {}
    assert published_figures(GMFlowConfig.base(), "kitti", "training", 200) == {}
    assert published_figures(GMFlowConfig.base(), "mine", "training", 200) == {}


def test_published_figures_stand_beside_those_of_whole_sets_alone(manifests, monkeypatch):
    """The paper's figure is of every pair: beside an excerpt's it would be a comparison of nothing."""
    whole = EvaluationSet(Manifest.load(manifests["sintel"]), "training-clean")
    part = EvaluationSet(whole.manifest, "training-clean", limit=2)
    assert published_figures(GMFlowConfig.refine(), "sintel", "training-clean", len(whole)) == {}, "6 of 1,041 pairs"
    monkeypatch.setitem(EXPECTED_COUNTS["sintel"], "training-clean", len(whole))
    found: Any = SimpleNamespace(pooled={"epe": 1.5})
    table = figures_table(GMFlowConfig.refine(), {"whole": (whole, found), "part": (part, found)})
    assert table.rows == [["whole", 6, {"value": 1.5, "published": 1.084}], ["part", 2, 1.5]]
    assert table.note
    assert not figures_table(GMFlowConfig.refine(), {"part": (part, found)}).note


def evaluation_of(epe: dict[str, float | None], scenes: dict[str, float | None]) -> Any:
    """None stands for an EPE without a valid pixel."""

    def figures(value: float | None) -> dict[str, float]:
        if value is None:
            return dict.fromkeys(["epe", "px1", "px3", "f1_all", "wauc"], math.nan)
        return {"epe": value, "px1": 1.0, "px3": 2.0, "f1_all": 3.0, "wauc": 4.0}

    images = {key: figures(value) for key, value in epe.items()}
    return SimpleNamespace(images=images, scenes={scene: figures(value) for scene, value in scenes.items()})


def test_the_worst_pairs_and_scenes_come_first_and_those_without_a_figure_last():
    first = evaluation_of({"a": 1.0, "b": None, "c": 9.0}, {"calm": 0.5, "none": None, "wild": 7.0})
    sets: Any = {
        "one": ([0] * 4, first),
        "two": ([0] * 20, evaluation_of({f"d{n}": 2 + n / 100 for n in range(20)}, {})),
    }
    rows = worst_pairs(sets)
    assert [one[:3] for one in rows[:2]] == [["c", "one", 9.0], ["d19", "two", 2.19]]
    assert len(rows) == 12
    assert "b" not in [one[0] for one in rows]
    (table,) = scene_tables(sets)
    assert [one[0] for one in table.rows] == ["wild", "calm", "none"]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_the_worst_of_all(wrong: float):
    """Weights that diverged: the pairs one looks for."""
    one = evaluation_of({"a": 9.0, "b": wrong, "c": None}, {"calm": 9.0, "wrong": wrong, "none": None})
    sets: Any = {"one": ([0] * 4, one)}
    assert [row[0] for row in worst_pairs(sets)] == ["b", "a", "c"]
    (table,) = scene_tables(sets)
    assert [row[0] for row in table.rows] == ["wrong", "calm", "none"]
    gallery = Gallery("s", frozenset(), 1)
    for number, error in enumerate([50.0, wrong, 60.0]):
        gallery.offer(number, scored(number, error))
    gallery.offer(3, without_truth(3))
    (card,) = gallery.cards()
    assert not math.isfinite(card.figures["epe"])
    assert without_nan(card.figures)["epe"] is None


def test_what_is_no_curriculums_run_is_said_in_a_line(call):
    client = mlflow_client.connect(None)
    other = tracking.start_run(client, "scores", "evaluate", {}).info.run_id
    for run, words in (
        (other, "its config.yaml cannot be had: this is no curriculum's run"),
        ("0" * 32, "no curriculum's run at"),
    ):
        code, _, err = call(pipelines.report, "--run", run)
        assert code == 2
        assert err.startswith(f"error: run {run}: ")
        assert words in err
        assert err.count("\n") == 1
