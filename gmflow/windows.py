"""Window order: the transformer keeps its tokens window after window.

Attention inside a window then reads consecutive rows of one matrix, and everything else that a block does concerns
single tokens, whatever their order. So windows are never cut out and put back: the tokens are permuted when the grid of
windows moves from one block to the next, and at no other time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowGroup:
    """Windows of a grid that have the same regions, over all maps; those of the first half of the maps come first.

    Attributes:
        windows: number of windows.
        length: tokens in each window.
        regions: int64 `[n, length]`: of each token, which region of the map it belongs to; tokens of different regions
            do not attend to each other. n = 1 where all windows of the group have the same regions; in an exported
            program n is the windows of one map, repeated for each map. None where no window has more than one region.
    """

    windows: int
    length: int
    regions: Tensor | None


@dataclass(frozen=True)
class WindowGrid:
    """A partition of N feature maps into windows, as a permutation of their N·h·w tokens.

    Attributes:
        order: int64 `[N*h*w]`; token i of the window order is token `order[i]` of the row-major order.
        inverse: int64 `[N*h*w]`, the inverse permutation.
        groups: the windows in window order.
    """

    order: Tensor
    inverse: Tensor
    groups: tuple[WindowGroup, ...]


def window_grid(
    maps: int, height: int, width: int, splits: int, *, shifted: bool, cut: bool, device: torch.device
) -> WindowGrid:
    """The grid of `splits` × `splits` windows; `shifted`, moved down and right by half a window, wrapping around the
    border.

    A window that wraps around holds two or four regions that are not neighbours in the map. The reference keeps it
    whole and masks pairs of different regions: `cut=False`. With `cut=True` each region becomes a window of its own and
    no mask is needed. The results differ by rounding alone, because the reference's mask leaves such a pair e^-100 of
    its weight. When exporting, `cut` is ignored: all windows are alike and have regions, which keeps the graph small.
    """
    starts = torch.arange(maps, device=device).view(-1, 1, 1, 1, 1) * (height * width)
    order: list[Tensor] = []
    groups: list[WindowGroup] = []
    for rows, row_regions in _strips(height, splits, shifted, cut, device):
        for columns, column_regions in _strips(width, splits, shifted, cut, device):
            within = rows[:, None, :, None] * width + columns[None, :, None, :]  # [n, m, window h, window w]
            order.append((starts + within).flatten())
            regions = None
            if row_regions is not None or column_regions is not None:
                y = torch.zeros_like(rows[:1]) if row_regions is None else row_regions
                x = torch.zeros_like(columns[:1]) if column_regions is None else column_regions
                regions = (2 * y[:, None, :, None] + x[None, :, None, :]).flatten(2).flatten(0, 1)
            length = rows.shape[1] * columns.shape[1]
            groups.append(WindowGroup(maps * len(rows) * len(columns), length, regions))
    tokens = torch.cat(order)
    inverse = torch.empty_like(tokens)
    inverse[tokens] = torch.arange(tokens.shape[0], device=device)
    return WindowGrid(tokens, inverse, tuple(groups))


def _strips(
    length: int, splits: int, shifted: bool, cut: bool, device: torch.device
) -> list[tuple[Tensor, Tensor | None]]:
    """The windows along one axis, in groups of one size: their coordinates and, if any, regions, `[n, size]` each."""
    size = length // splits
    shift = size // 2 if shifted else 0
    coordinates = torch.arange(length, device=device)
    if shifted and torch.compiler.is_exporting():
        coordinates = torch.where(coordinates + shift < length, coordinates + shift, coordinates + shift - length)
        coordinates = coordinates.view(splits, size)
        return [(coordinates, (coordinates < shift).long())]
    if shift == 0:
        return [(coordinates.view(splits, size), None)]
    coordinates = torch.cat([coordinates[shift:], coordinates[:shift]]).view(splits, size)
    whole, around = (coordinates[:-1], None), coordinates[-1:]
    if not cut:
        return [whole, (around, (around < shift).long())]
    if size == 2 * shift:
        return [whole, (around.view(2, shift), None)]  # two windows of one size in one group: fewer calls
    return [whole, (around[:, : size - shift], None), (around[:, size - shift :], None)]


def permute_tokens(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows of `tokens` `[T, C]` in the given order; the backward pass is the inverse permutation, not a scatter."""
    permuted: Tensor = _Permute.apply(tokens, order, inverse)  # type: ignore[no-untyped-call]
    return permuted


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return tokens.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute_tokens(gradient, inverse, order), None, None
