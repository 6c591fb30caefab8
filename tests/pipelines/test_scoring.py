"""Errors on whole sets: pooled over pixels, their pairs read and drawn while the model computes."""

import copy
import functools
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.manifest import Manifest
from gmflow import GMFlow, GMFlowConfig
from pipelines import scoring
from pipelines.scoring import ScoringOptions, evaluate, evaluate_on_ray, pool
from pipelines.training import validation
from pipelines.training.pictures import comparison_png
from tests.waiting import WAIT_SECONDS


def pixels(scored: EvaluationSet) -> list[int]:
    return [int(scored[number].valid.sum()) for number in range(len(scored))]


def test_figures_are_pooled_over_pixels_not_pairs_or_sets(manifests):
    """Zero flow on sets whose pairs have unequal numbers of valid pixels."""
    sets = [
        EvaluationSet(Manifest.load(manifests["kitti"]), None),
        EvaluationSet(Manifest.load(manifests["chairs"]), "val"),
    ]
    found = [evaluate(None, chosen, torch.device("cpu")) for chosen in sets]
    counts, errors_ = [], []
    for chosen, evaluation in zip(sets, found, strict=True):
        own = pixels(chosen)
        epe = [figures["epe"] for figures in evaluation.images.values()]
        assert evaluation.pooled["epe"] == pytest.approx(np.average(epe, weights=own))
        counts += own
        errors_ += epe
    assert len(set(counts)) > 2
    pooled = pool(found)["epe"]
    assert pooled == pytest.approx(np.average(errors_, weights=counts))
    assert pooled != pytest.approx(np.mean(errors_), rel=1e-3)


class _Watched(EvaluationSet):
    """Tells when a sample is read."""

    def __init__(self, manifest: Manifest, subset: str | None) -> None:
        super().__init__(manifest, subset)
        self.reads = [threading.Event() for _ in self.indices]

    def __getitem__(self, number: int) -> Any:
        sample = super().__getitem__(number)
        self.reads[number].set()
        return sample


def of_validation(model: GMFlow, chosen: EvaluationSet) -> dict[str, float]:
    alone: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), all_reduce=lambda values: values)
    found = validation.validate(model, chosen, alone, lambda done: None, lambda: False)
    assert found is not None
    return found[0]


def of_evaluation(model: GMFlow, chosen: EvaluationSet) -> dict[str, float]:
    return evaluate(model, chosen, torch.device("cpu")).pooled


@pytest.mark.parametrize("figures", [of_validation, of_evaluation])
def test_the_next_pair_is_read_while_the_model_computes(manifests, monkeypatch, figures: Callable[..., Any]):
    chosen = _Watched(Manifest.load(manifests["chairs"]), "val")
    calls = iter(range(len(chosen)))

    def forward(model: GMFlow, image0: torch.Tensor, *_: Any, **__: Any) -> Any:
        number = next(calls)
        assert all(read.wait(WAIT_SECONDS) for read in chosen.reads[: number + 2])
        assert not any(read.is_set() for read in chosen.reads[number + 2 :]), "no more is held than that"
        return SimpleNamespace(flow=torch.zeros(1, 2, *image0.shape[-2:]), backward_flow=None)

    monkeypatch.setattr(validation, "padded_forward", forward)
    model = GMFlow(GMFlowConfig(feature_channels=16, backbone_channels=(8, 8, 8), num_layers=1))
    expected = evaluate(None, EvaluationSet(chosen.manifest, "val"), torch.device("cpu")).pooled
    assert figures(model, chosen) == pytest.approx(expected, rel=0, nan_ok=True), "zero flow"
    assert next(calls, None) is None


def test_a_picture_is_drawn_and_kept_while_the_model_goes_on(manifests, monkeypatch):
    chosen = _Watched(Manifest.load(manifests["chairs"]), "val")
    kept = {}

    def keep(key: str, picture: bytes | None) -> None:
        assert chosen.reads[-1].wait(WAIT_SECONDS), "the rest waits for it"
        kept[key] = picture

    evaluate(None, chosen, torch.device("cpu"), ScoringOptions(pictures=True), keep)
    expected = {}
    for number, scored in enumerate(validation.score(None, list(chosen), torch.device("cpu"))):
        expected[chosen[number].key] = comparison_png(scored)
    assert kept == expected


def test_a_pairs_time_is_the_median_without_the_first(manifests, monkeypatch):
    """The first one's holds what is done once."""
    times = iter([60.0, 3.0, 1.0, 2.0, 9.0, 4.0])

    def score(*_: Any, **__: Any) -> Any:
        for scored in validation.score(None, list(chosen), torch.device("cpu")):
            yield replace(scored, seconds=next(times))

    chosen = EvaluationSet(Manifest.load(manifests["sintel"]), "training-clean", limit=6)
    monkeypatch.setattr(scoring, "score", score)
    assert len(chosen) == 6
    assert evaluate(None, chosen, torch.device("cpu")).seconds == 3.0
    times = iter([60.0])
    chosen = EvaluationSet(chosen.manifest, "training-clean", limit=1)
    assert evaluate(None, chosen, torch.device("cpu")).seconds == 60.0, "there are no others"


def test_pictures_are_drawn_where_they_are_asked_for_alone(manifests, monkeypatch):
    monkeypatch.setattr(scoring, "comparison_png", lambda scored: pytest.fail("drawn"))
    told = []
    chosen = EvaluationSet(Manifest.load(manifests["chairs"]), "val")
    evaluate(None, chosen, torch.device("cpu"), ScoringOptions(), lambda key, picture: told.append(picture))
    assert told == [None] * len(chosen)


class _Tasks:
    """In the place of Ray: each task runs when its result is fetched, and the one that was started last ends first."""

    def __init__(self) -> None:
        self.needs: list[dict[str, int]] = []

    def put(self, value: object) -> object:
        return value

    def remote(self, **needs: int) -> Any:
        self.needs.append(needs)
        started = iter(range(1000))
        return lambda function: SimpleNamespace(
            remote=lambda *arguments: (next(started), functools.partial(function, *copy.deepcopy(arguments)))
        )

    def wait(self, waiting: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        *others, last = sorted(waiting, key=lambda task: task[0])
        return [last], others


def test_tasks_that_end_in_any_order_give_the_evaluation_of_the_whole_set(manifests, monkeypatch):
    chosen = EvaluationSet(Manifest.load(manifests["sintel"]), "training-final")
    model = GMFlow(GMFlowConfig(feature_channels=16, backbone_channels=(8, 8, 8), num_layers=1)).eval()
    options = ScoringOptions("sintel", gallery=2, pictures=True)
    pictures: list[dict[str, bytes | None]] = [{}, {}]
    tasks, times, peaks = _Tasks(), iter([60.0, 3.0, 60.0, 2.0, 60.0, 9.0]), iter([5, 9, 7])

    def timed(*arguments: Any, **how: Any) -> Any:
        for scored in validation.score(*arguments, **how):
            yield replace(scored, seconds=next(times))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = evaluate(model, chosen, torch.device("cpu"), options, pictures[0].__setitem__)
        torch.set_num_threads(2)
        monkeypatch.setattr(scoring, "ray", tasks)
        monkeypatch.setattr(scoring, "fetched", lambda task: task[1]())
        monkeypatch.setattr(scoring, "_TASK_PAIRS", 2)
        monkeypatch.setattr(scoring, "score", timed)
        monkeypatch.setattr(scoring, "peak_bytes", lambda device: next(peaks))
        found = evaluate_on_ray(model, chosen, options, use_gpu=False, on_scored=pictures[1].__setitem__)
        assert torch.get_num_threads() == 1, "a task has one CPU"
    finally:
        torch.set_num_threads(threads)
    assert tasks.needs == [{"num_cpus": 1, "num_gpus": 0}]
    assert torch.equal(found.sums.state(), whole.sums.state())
    assert json.dumps([found.images, found.scenes]) == json.dumps([whole.images, whole.scenes])
    cards = [[(card.key, card.worst, card.pictures) for card in one.cards] for one in (found, whole)]
    assert cards[0] == cards[1]
    assert len(cards[0]) == 2
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == len(chosen) == 6
    assert (found.seconds, found.peak_bytes) == (3.0, 9)
