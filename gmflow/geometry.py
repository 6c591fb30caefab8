"""Pixel grids, bilinear resampling, and the forward-backward check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

OCCLUSION_ALPHA = 0.01
"""Tolerance of the forward-backward check in pixels per pixel of motion."""

OCCLUSION_BETA = 0.5
"""Tolerance of the forward-backward check in pixels."""


def pixel_grid(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Coordinates (x, y) of every pixel: float32 `[height, width, 2]`, built on `device`."""
    y = torch.arange(height, dtype=torch.float32, device=device)
    x = torch.arange(width, dtype=torch.float32, device=device)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


def backward_warp(image: Tensor, flow: Tensor) -> Tensor:
    """What `image` shows at p + flow(p), for every pixel p: bilinear, zero outside the image.

    Args:
        image: float `[B, C, H, W]`.
        flow: float `[B, 2, H, W]`, pixels (x right, y down).

    Returns:
        `[B, C, H, W]`.
    """
    height, width = image.shape[-2:]
    target = pixel_grid(height, width, image.device) + flow.permute(0, 2, 3, 1)  # [B, H, W, 2]
    extent = torch.stack([target.new_full((), max(size - 1, 1)) for size in (width, height)])
    grid = 2 * target / extent - 1
    # PyTorch adds up the image's gradient in a fixed order on a CPU, and in one that varies on a GPU.
    if image.is_cpu or flow.requires_grad or not (torch.is_grad_enabled() and image.requires_grad):
        return _sample(image, grid)
    warped: Tensor = _OrderedSample.apply(image.to(grid.dtype), grid)  # type: ignore[no-untyped-call]
    return warped


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


class _OrderedSample(torch.autograd.Function):
    """`_sample` whose image gradient has the same bits every time; the grid gets no gradient."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.extent = image.shape[-2:]
        return _sample(image, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        height, width = ctx.extent
        batch, channels = gradient.shape[:2]
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, channels)  # [B*h*w, C]
        x, left = _cells(grid[..., 0], width)  # [B, h, w]
        y, top = _cells(grid[..., 1], height)
        first = torch.arange(batch, device=grid.device).view(-1, 1, 1) * (height * width)
        total = rows.new_zeros(batch * height * width, channels)
        for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = torch.where(inside, (1 - (x - column).abs()) * (1 - (y - row).abs()), 0.0)
            place = first + row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            # PyTorch sorts the rows by place before it adds them up.
            total.index_put_((place.flatten(),), rows * weight.view(-1, 1), accumulate=True)
        return total.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def _cells(grid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Positions -1..1 along an axis → coordinates in pixels, at most two outside the image, and their floors."""
    coordinate = torch.nan_to_num((grid + 1) / 2 * (size - 1), nan=-2.0).clamp(-2, size + 1)
    return coordinate, coordinate.floor()


def upsample_flow(flow: Tensor, factor: int) -> Tensor:
    """Flow on a grid `factor` times as fine, in that grid's pixels: `[B, 2, h, w]` → `[B, 2, factor*h, factor*w]`."""
    if flow.is_cpu:
        return factor * F.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=True)
    upsampled: Tensor = _OrderedUpsample.apply(flow, factor)  # type: ignore[no-untyped-call]
    return factor * upsampled


class _OrderedUpsample(torch.autograd.Function):
    """Bilinear interpolation, corners aligned, whose gradient has the same bits every time."""

    @staticmethod
    def forward(ctx: Any, flow: Tensor, factor: int) -> Tensor:
        ctx.extent, ctx.factor = flow.shape[-2:], factor
        upsampled: Tensor = torch.ops.aten.upsample_bilinear2d(flow, [factor * size for size in ctx.extent], True)
        return upsampled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows, columns = (_interpolation(size, ctx.factor, gradient.device) for size in ctx.extent)
        # In float64, because float32 products are rounded if the process allows TF32.
        return (rows.T @ gradient.double() @ columns).to(gradient.dtype), None


def _interpolation(size: int, factor: int, device: torch.device) -> Tensor:
    """Weight of each of `size` coarse values in each of `factor·size` fine ones: float64 `[factor*size, size]`."""
    fine = torch.arange(factor * size, dtype=torch.float64, device=device) * ((size - 1) / max(factor * size - 1, 1))
    apart = fine[:, None] - torch.arange(size, dtype=torch.float64, device=device)
    return (1 - apart.abs()).clamp(min=0)


def forward_backward_occlusion(forward_flow: Tensor, backward_flow: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels whose flow is not undone by the flow in the other direction.

    A pixel p is occluded where |f(p) + g(p + f(p))| > alpha · (|f(p)| + |g(p)|) + beta, with f the flow of its own
    image and g that of the other one. The tolerances are those of UnFlow (Meister et al., AAAI 2018), alpha = 0.01 and
    beta = 0.5 px.

    Args:
        forward_flow: `[B, 2, H, W]`, pixels of image 0 to image 1.
        backward_flow: `[B, 2, H, W]`, pixels of image 1 to image 0.

    Returns:
        Two bool `[B, H, W]`, true = occluded: for image 0 and for image 1.
    """
    tolerance = OCCLUSION_ALPHA * (vector_length(forward_flow) + vector_length(backward_flow)) + OCCLUSION_BETA
    forward_gap = vector_length(forward_flow + backward_warp(backward_flow, forward_flow))
    backward_gap = vector_length(backward_flow + backward_warp(forward_flow, backward_flow))
    return ~(forward_gap <= tolerance), ~(backward_gap <= tolerance)  # flow that is not finite is undone by none


def vector_length(vectors: Tensor) -> Tensor:
    """Lengths `[B, H, W]` of vectors `[B, 2, H, W]`; on a CPU many times as fast as `norm` over a dimension of two."""
    x, y = vectors.unbind(1)
    return (x.square() + y.square()).sqrt()
