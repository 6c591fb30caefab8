"""Which windows and radii are valid at a size."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmflow import GMFlow, GMFlowConfig
from gmflow.errors import GMFlowError
from pipelines.errors import PipelineError
from pipelines.sweeping.settings import check_crop, check_size, padded_size
from tests.pipelines.sweeping.made import REFINE


def runs(model: GMFlowConfig, size: tuple[int, int]) -> bool:
    """Whether the model itself takes images of this size, with whole windows of two feature pixels at least."""
    try:
        GMFlow(model)._check(torch.zeros(1, 3, *size), torch.zeros(1, 3, *size))
    except GMFlowError:
        return False
    return all(min(size) // s // k >= 2 for s, k in zip(model.strides, model.attn_splits, strict=True))


@pytest.mark.parametrize("scale", [0, 1])
def test_a_crops_valid_splits_are_those_the_model_takes(scale):
    crop = (96, 160)
    tiny = {"backbone_channels": (4, 4, 4), "feature_channels": 4, "num_layers": 1}
    taken = []
    for splits in range(1, 30):
        pair = (splits, 1) if scale == 0 else (1, splits)
        if runs(replace(REFINE, attn_splits=pair, **tiny), crop):
            taken.append(splits)
    with pytest.raises(PipelineError, match=r"crop 96×160") as error:
        check_crop(replace(REFINE, attn_splits=(7, 1) if scale == 0 else (1, 7)), crop, "here")
    listed = str(error.value).rpartition("valid are ")[2]
    assert [int(value) for value in listed.split(", ")] == taken
    for splits in taken:
        check_crop(replace(REFINE, attn_splits=(splits, 1) if scale == 0 else (1, splits)), crop, "here")


@settings(deadline=None)  # a shared machine is no reason to fail
@given(st.tuples(st.integers(1, 20), st.integers(1, 40)), st.tuples(st.integers(40, 500), st.integers(40, 1300)))
def test_an_evaluated_size_is_refused_with_splits_that_are_then_accepted(splits, size):
    model = replace(REFINE, attn_splits=splits, corr_radius=(-1, 1))
    try:
        check_size(model, size, "here")
    except PipelineError as error:
        scale = int(re.search(r"at scale (\d)", str(error))[1]) - 1
        listed = str(error).rpartition("at the other scale are ")[2]
        for valid in [] if listed == "none" else listed.split(", "):
            pair = list(splits)
            pair[scale] = int(valid)
            padded = padded_size(replace(model, attn_splits=tuple(pair)), size)
            window = [length // pair[scale] for length in padded]
            assert all(p - s < w for p, s, w in zip(padded, size, window, strict=True))
        return
    padded = padded_size(model, size)
    assert not any(length % model.size_multiple for length in padded)
    assert all(p - s < p // k for k in splits for p, s in zip(padded, size, strict=True))


def test_sintels_usual_windows_are_valid_and_absurd_ones_are_not():
    for splits in ((1, 2), (2, 8), (4, 16)):
        check_size(replace(REFINE, attn_splits=splits), (436, 1024), "here")
    assert padded_size(REFINE, (436, 1024)) == (448, 1024)
    with pytest.raises(PipelineError, match=r"attn_splits 16 at scale 1 .* padded to 512×1024"):
        check_size(replace(REFINE, attn_splits=(16, 8)), (436, 1024), "here")


@pytest.mark.parametrize("radius", [4, 99])
def test_a_radius_larger_than_the_map_names_the_largest(radius):
    with pytest.raises(PipelineError, match=rf"corr_radius {radius} makes no sense at scale 2; valid are 1 to 3"):
        check_crop(replace(REFINE, attn_splits=(1, 2), corr_radius=(-1, radius)), (32, 48), "here")
    check_crop(replace(REFINE, attn_splits=(1, 2), corr_radius=(-1, 3)), (32, 48), "here")


def test_a_window_of_two_feature_pixels_is_enough():
    check_size(replace(REFINE, attn_splits=(4, 4), corr_radius=(-1, 1)), (64, 64), "here")
