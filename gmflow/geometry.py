"""Pixel grids, bilinear resampling, and the forward-backward check."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    # PyTorch's gradient of the image is a sum in one order on a CPU, and in whatever order comes on a GPU.
    if image.is_cpu or flow.requires_grad or not (torch.is_grad_enabled() and image.requires_grad):
        return _sample(image, grid)
    warped: Tensor = _OrderedSample.apply(image.to(grid.dtype), grid)  # type: ignore[no-untyped-call]
    return warped


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


class _OrderedSample(torch.autograd.Function):
    """`_sample` whose gradient has the same bits every time; none of the grid."""

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
            # Sorted by place before they are added up.
            total.index_put_((place.flatten(),), rows * weight.view(-1, 1), accumulate=True)
        return total.view(batch, height, width, channels).permute(0, 3, 1, 2), None


def _cells(grid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Positions -1..1 along an axis → coordinates in pixels, at most two outside, and the pixels before them."""
    coordinate = torch.nan_to_num((grid + 1) / 2 * (size - 1), nan=-2.0).clamp(-2, size + 1)
    return coordinate, coordinate.floor()


def upsample_flow(flow: Tensor, factor: int) -> Tensor:
    """Flow on a grid `factor` times as fine, in that grid's pixels: `[B, 2, h, w]` → `[B, 2, factor*h, factor*w]`."""
    if factor == 1:
        return flow
    if flow.is_cpu:
        return factor * F.interpolate(flow, scale_factor=factor, mode="bilinear", align_corners=True)
    upsampled: Tensor = _OrderedUpsample.apply(flow, factor)  # type: ignore[no-untyped-call]
    return factor * upsampled


class _OrderedUpsample(torch.autograd.Function):
    """Bilinear interpolation, corners aligned, whose gradient is the same to the last bit every time."""

    @staticmethod
    def forward(ctx: Any, flow: Tensor, factor: int) -> Tensor:
        ctx.extent, ctx.factor = flow.shape[-2:], factor
        upsampled: Tensor = torch.ops.aten.upsample_bilinear2d(flow, [factor * size for size in ctx.extent], True)
        return upsampled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        rows, columns = (_interpolation(size, ctx.factor, gradient.device) for size in ctx.extent)
        # In float64, which no setting of the process rounds on its way through the tensor cores.
        return (rows.T @ gradient.double() @ columns).to(gradient.dtype), None


def _interpolation(size: int, factor: int, device: torch.device) -> Tensor:
    """What each of `factor·size` values takes of each of `size` along an axis: float64 `[factor*size, size]`."""
    fine = torch.arange(factor * size, dtype=torch.float64, device=device) * ((size - 1) / max(factor * size - 1, 1))
    apart = fine[:, None] - torch.arange(size, dtype=torch.float64, device=device)
    return (1 - apart.abs()).clamp(min=0)


def forward_backward_occlusion(
    forward_flow: Tensor, backward_flow: Tensor, *, alpha: float = 0.01, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Pixels whose flow is not undone by the flow in the other direction.

    A pixel p is occluded where |f(p) + g(p + f(p))| > alpha · (|f(p)| + |g(p)|) + beta, with f the flow of its own
    image and g that of the other one.

    Args:
        forward_flow: `[B, 2, H, W]`, pixels of image 0 to image 1.
        backward_flow: `[B, 2, H, W]`, pixels of image 1 to image 0.
        alpha: tolerance in pixels per pixel of motion.
        beta: tolerance in pixels.

    Returns:
        Two bool `[B, H, W]`, true = occluded: for image 0 and for image 1.
    """
    tolerance = alpha * (vector_length(forward_flow) + vector_length(backward_flow)) + beta
    forward_gap = vector_length(forward_flow + backward_warp(backward_flow, forward_flow))
    backward_gap = vector_length(backward_flow + backward_warp(forward_flow, backward_flow))
    return forward_gap > tolerance, backward_gap > tolerance


def vector_length(vectors: Tensor) -> Tensor:
    """Lengths `[B, H, W]` of vectors `[B, 2, H, W]`; on a CPU many times as fast as `norm` over a dimension of two."""
    x, y = vectors.unbind(1)
    return (x.square() + y.square()).sqrt()
