"""Warping, upsampling and occlusion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gmflow.geometry import _OrderedSample, _OrderedUpsample, backward_warp, forward_backward_occlusion


def test_warp_reads_where_the_flow_points() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[:, 0] = 1
    warped = backward_warp(image, flow)
    torch.testing.assert_close(warped[..., :3], image[..., 1:])
    assert warped[..., 3].abs().max() == 0


def random64(*shape: int, seed: int, requires_grad: bool = False) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.requires_grad_(requires_grad)


def test_the_gradient_of_a_warp_that_adds_up_in_order_is_pytorchs() -> None:
    """It is taken on GPUs; positions inside, at the border and far outside."""
    image = random64(2, 5, 7, 9, seed=0, requires_grad=True)
    grid, upper = random64(2, 6, 8, 2, seed=1), random64(2, 5, 6, 8, seed=2)
    grid[0, 0, :3] = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 1.0]])
    warped = _OrderedSample.apply(image, grid)
    (found,) = torch.autograd.grad(warped, image, upper)
    plain = torch.nn.functional.grid_sample(image, grid, align_corners=True)
    (wanted,) = torch.autograd.grad(plain, image, upper)
    assert torch.equal(warped, plain)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    grid[1, 2, 3], grid[1, 2, 4] = math.nan, math.inf  # of a flow that is lost: its step is skipped, not crashed
    (lost,) = torch.autograd.grad(_OrderedSample.apply(image, grid), image, upper)
    assert lost.isfinite().all()


@pytest.mark.parametrize(("height", "width", "factor"), [(5, 7, 2), (6, 4, 8), (1, 3, 4), (1, 1, 8)])
def test_the_gradient_of_upsampling_that_adds_up_in_order_is_pytorchs(height: int, width: int, factor: int) -> None:
    flow = random64(2, 2, height, width, seed=0, requires_grad=True)
    upper = random64(2, 2, factor * height, factor * width, seed=1)
    upsampled = _OrderedUpsample.apply(flow, factor)
    plain = torch.nn.functional.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=True)
    assert torch.equal(upsampled, plain)
    (found,), (wanted,) = (torch.autograd.grad(one, flow, upper) for one in (upsampled, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_consistent_flow_has_no_occlusion() -> None:
    flow = torch.zeros(1, 2, 4, 6)
    flow[:, 0] = 2
    forward, backward = forward_backward_occlusion(flow, -flow)
    assert forward[0, 0].tolist() == [False] * 4 + [True] * 2
    assert backward[0, 0].tolist() == [True] * 2 + [False] * 4
