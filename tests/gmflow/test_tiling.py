"""Flow by tiles: the tiles' flow put together right, motion beyond a tile found, no seams."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gmflow import GMFlow, GMFlowConfig, GMFlowError, Tiling, load_model, predict_batch, predict_flow
from gmflow.tiling import _coarse_flow, tiled_flow


def tagged_images(height: int, width: int, u: int, v: int) -> tuple[Tensor, Tensor]:
    """Image 0 holds each pixel's own coordinates; image 1 is image 0 moved by (u, v)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image0 = torch.stack([x, y, torch.zeros_like(x)]).float()[None]
    image1 = image0.clone()
    image1[:, 0] -= u
    image1[:, 1] -= v
    return image0, image1


class ExactFlow:
    """Reads the flow of tagged images from the tags: how far they differ, in the images' own pixels."""

    def __init__(self) -> None:
        self.most_pixels = 0

    def __call__(self, image0: Tensor, image1: Tensor) -> Tensor:
        height, width = image0.shape[2:]
        self.most_pixels = max(self.most_pixels, height * width)
        y, x = height // 2, width // 2
        pitch = torch.stack([image0[0, 0, y, x + 1] - image0[0, 0, y, x], image0[0, 1, y + 1, x] - image0[0, 1, y, x]])
        return (image0[:, :2] - image1[:, :2]) / pitch.view(1, 2, 1, 1)


@pytest.mark.parametrize("motion", [(0, 0), (7, -3), (90, 40), (-90, -40)])
@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_tiles_that_are_exact_make_an_exact_whole(motion: tuple[int, int], overlap: int) -> None:
    image0, image1 = tagged_images(150, 211, *motion)
    compute = ExactFlow()
    flow = tiled_flow(compute, image0, image1, Tiling(64, 80, overlap))
    wanted = torch.tensor(motion).float().view(1, 2, 1, 1).expand_as(flow)
    torch.testing.assert_close(flow, wanted, atol=2e-4, rtol=0)
    assert compute.most_pixels <= 64 * 80


@pytest.mark.parametrize(("tile", "overlap"), [((8, 64), 0), ((64, 64), 33), ((64, 64), -1)])
def test_tiles_that_cannot_be_are_refused(tile: tuple[int, int], overlap: int) -> None:
    with pytest.raises(GMFlowError, match="at least 16×16"):
        Tiling(*tile, overlap)


@pytest.mark.parametrize(("size", "covered"), [((64, 80), True), ((65, 8), False), ((8, 81), False)])
def test_a_tile_covers_what_is_neither_higher_nor_wider(size: tuple[int, int], covered: bool) -> None:
    assert Tiling(64, 80, 16).covers(*size) == covered


def test_a_few_lost_places_of_the_rough_flow_move_no_tile() -> None:
    """A tile goes where most of it goes: rough flow is often far off in parts."""
    starts: set[tuple[float, float]] = set()

    class Torn(ExactFlow):
        def __call__(self, image0: Tensor, image1: Tensor) -> Tensor:
            flow = super().__call__(image0, image1)
            if image0[0, 0, 0, 1] - image0[0, 0, 0, 0] == 1:  # a tile
                starts.add(tuple((image1[0, :2, 0, 0] - image0[0, :2, 0, 0]).tolist()))
            else:
                flow[..., ::8] = 60
            return flow

    tiled_flow(Torn(), *tagged_images(150, 211, 0, 0), Tiling(64, 80, 16))
    assert starts == {(0.0, 0.0)}


def test_the_small_version_of_a_frame_shows_no_stripes_that_the_frame_has_not() -> None:
    """A texture finer than its pixels becomes grey, not a coarser pattern, which would seem to move."""
    seen: list[float] = []

    def compute(image0: Tensor, image1: Tensor) -> Tensor:
        seen.append(float(image0[..., 2:-2].std()))
        return torch.zeros_like(image0[:, :2])

    stripes = torch.zeros(1, 3, 200, 300)
    stripes[..., ::2] = 255
    tiled_flow(compute, stripes, stripes, Tiling(64, 80, 16))
    rough, *tiles = seen
    assert rough < 20
    assert min(tiles) > 120


def test_a_frame_no_larger_than_a_tile_is_computed_whole() -> None:
    torch.manual_seed(0)
    model = GMFlow(GMFlowConfig(backbone_channels=(4, 6, 8), feature_channels=8, num_layers=1))
    frames = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), dtype=np.uint8)
    np.testing.assert_array_equal(predict_flow(model, *frames), predict_flow(model, *frames, tiling=Tiling(64, 64, 16)))


def test_tiles_give_both_ways_and_batches_too() -> None:
    torch.manual_seed(0)
    model = GMFlow(GMFlowConfig(backbone_channels=(4, 6, 8), feature_channels=8, num_layers=1))
    frames = np.random.default_rng(0).integers(0, 256, (2, 80, 100, 3), dtype=np.uint8)
    pairs = [(frames[0], frames[1]), (frames[1], frames[0])]
    one, other = predict_batch(model, pairs, bidirectional=True, tiling=Tiling(64, 64, 16))
    assert one.backward_flow is not None
    assert other.backward_flow is not None
    assert one.occluded is not None
    np.testing.assert_allclose(one.backward_flow, other.flow, atol=1e-4)
    np.testing.assert_allclose(other.backward_flow, one.flow, atol=1e-4)
    assert one.occluded.shape == (80, 100)
    assert one.occluded.dtype == np.bool_


def jump(flow: np.ndarray, columns: list[int]) -> float:
    """Mean change of the flow from one pixel to the next across these columns."""
    across = np.linalg.norm(flow[:, 1:] - flow[:, :-1], axis=2)
    return float(across[:, [column - 1 for column in columns]].mean())


@pytest.mark.slow
def test_a_real_pair_by_tiles_loses_little_and_shows_no_seams(
    reference: Path, samples: Path, read_image: Callable[[Path], np.ndarray], read_flo: Callable[[Path], Any]
) -> None:
    model = load_model(reference / "gmflow_refine_published.pth")
    data = samples / "FlyingChairs_release" / "data"
    frames = [read_image(data / f"00002_img{n}.ppm") for n in (1, 2)]
    truth = read_flo(data / "00002_flow.flo")
    flow = predict_flow(model, frames[0], frames[1], tiling=Tiling(256, 320, 64))
    error = float(np.linalg.norm(flow - truth, axis=2).mean())
    assert error < 2.0  # measured 1.919; the whole frame 1.329: these tiles are far smaller than anybody would choose
    borders = [192, 320]  # where the two columns of tiles begin and end
    elsewhere = [column for column in range(2, 511) if min(abs(column - border) for border in borders) > 8]
    assert jump(flow, borders) < 1.5 * jump(flow, elsewhere)


@pytest.mark.parametrize("motion", [(30, -20), (-24, 12)])
def test_a_tile_meets_the_part_of_image_1_to_which_it_moved(motion: tuple[int, int]) -> None:
    """Away from the border it sees no motion left; without that, motion beyond a tile would be lost."""
    left: list[float] = []

    class Watched(ExactFlow):
        def __call__(self, image0: Tensor, image1: Tensor) -> Tensor:
            flow = super().__call__(image0, image1)
            if image0[0, 0, 0, 1] - image0[0, 0, 0, 0] == 1:  # a tile, not the small version of the frame
                inside = all(float(image0[0, axis].min()) >= 32 for axis in (0, 1))
                inside &= float(image0[0, 0].max()) < 400 - 32 and float(image0[0, 1].max()) < 300 - 32
                left.extend([float(flow.abs().max())] if inside else [])
            return flow

    tiled_flow(Watched(), *tagged_images(300, 400, *motion), Tiling(64, 80, 16))
    assert left
    assert max(left) <= 1


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), float("-inf")])
def test_rough_flow_that_is_not_finite_counts_as_no_motion(lost: float) -> None:
    class Lost(ExactFlow):
        def __call__(self, image0: Tensor, image1: Tensor) -> Tensor:
            flow = super().__call__(image0, image1)
            return flow if image0[0, 0, 0, 1] - image0[0, 0, 0, 0] == 1 else torch.full_like(flow, lost)  # a tile's

    flow = tiled_flow(Lost(), *tagged_images(150, 211, 3, -2), Tiling(64, 80, 16))
    wanted = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand_as(flow)
    torch.testing.assert_close(flow, wanted, atol=2e-4, rtol=0)


def test_a_model_whose_flow_is_not_a_number_says_so_with_tiles_too() -> None:
    model = GMFlow(GMFlowConfig(backbone_channels=(4, 6, 8), feature_channels=8, num_layers=1))
    with torch.no_grad():
        model.backbone.projection.weight[0] = torch.nan
    frames = np.random.default_rng(0).integers(0, 256, (2, 80, 100, 3), dtype=np.uint8)
    whole, tiled = (predict_flow(model, *frames, tiling=tiling) for tiling in (None, Tiling(64, 64, 16)))
    assert np.isnan(whole).all()
    np.testing.assert_array_equal(tiled, whole)


@pytest.mark.parametrize(("height", "width"), [(40, 5000), (5000, 40), (5, 1000), (1000, 5)])
def test_not_even_of_a_very_long_frame_more_pixels_than_a_tile_are_computed_at_a_time(height: int, width: int) -> None:
    compute = ExactFlow()
    flow = tiled_flow(compute, *tagged_images(height, width, 0, 0), Tiling(32, 32, 8))
    assert flow.shape == (1, 2, height, width)
    assert compute.most_pixels <= 32 * 32


@pytest.mark.parametrize(("height", "width"), [(40, 5000), (5000, 40)])
def test_rough_flow_is_in_pixels_of_the_frame_also_where_its_sides_shrink_differently(height: int, width: int) -> None:
    flow = _coarse_flow(ExactFlow(), *tagged_images(height, width, 3, 6), pixels=32 * 32)
    middle = flow[:, height // 4 : -height // 4, width // 4 : -width // 4]
    wanted = torch.tensor([3.0, 6.0]).view(2, 1, 1).expand_as(middle)
    torch.testing.assert_close(middle, wanted, rtol=0, atol=0.1)


def test_neighbouring_tiles_are_faded_into_each_other() -> None:
    """Where they disagree, no line may be seen."""

    def second_tile(image0: Tensor, image1: Tensor) -> Tensor:
        return torch.full_like(image0[:, :2], float(image0[0, 0, 0, 0] == 48))  # its first column is the frame's 48th

    flow = tiled_flow(second_tile, *tagged_images(64, 112, 0, 0), Tiling(64, 64, 16))[0, 0]
    assert (flow[:, :48] == 0).all()
    assert (flow[:, 64:] == 1).all()
    steps = flow.diff(dim=1)
    assert steps.min() >= 0
    assert steps.max() < 0.1  # of a squared sine over 16 px
