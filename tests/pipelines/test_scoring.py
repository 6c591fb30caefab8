"""Errors on whole sets: pooled over pixels."""

import numpy as np
import pytest
import torch

from datasets_etl.loader import EvaluationSet
from datasets_etl.manifest import Manifest
from pipelines.scoring import evaluate, pool


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
