"""The order in which the transformer keeps its tokens: window after window.

In window order, attention inside a window reads consecutive rows of one matrix, and everything else a block does
concerns single tokens and cares for no order. So windows are never cut out and put back: the tokens are permuted
when the grid of windows moves from one block to the next, and at no other time.
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
        windows: how many.
        length: tokens in each.
        regions: int64 `[n, length]`, of n windows in turn: of 1, or in an exported program of all of a map. Tokens of
            different regions are no neighbours in the map. None where all are, as in all windows that are cut up.
    """

    windows: int
    length: int
    regions: Tensor | None


@dataclass(frozen=True)
class WindowGrid:
    """A partition of N feature maps into windows, as an order of their N·h·w tokens.

    Attributes:
        order: int64 `[N*h*w]`; token i of the window order is token `order[i]` of the row-major order.
        inverse: int64 `[N*h*w]`, the way back.
        groups: the windows in this order.
    """

    order: Tensor
    inverse: Tensor
    groups: tuple[WindowGroup, ...]


def window_grid(
    maps: int, height: int, width: int, splits: int, *, shifted: bool, cut: bool, device: torch.device
) -> WindowGrid:
    """`splits` × `splits` windows; shifted, the grid moved down and right by half a window, around the border.

    Windows that the border runs through consist of two or four regions. As the reference has it, they are whole and
    have `regions`: a mask for a few, none for most. With `cut` every region is a window of its own, and none needs a
    mask. Nothing but rounding tells the two apart: to a pair of different regions the reference gives e^-100 of its
    weight. An exported program is one graph for all sizes: the fewer kinds of windows, the smaller. There all are
    alike, and have regions.
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
    """The windows along one axis, whole ones and the one around the border: coordinates and regions `[n, size]`."""
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
        return [whole, (around.view(2, shift), None)]  # two windows of one size: half as many calls
    return [whole, (around[:, : size - shift], None), (around[:, size - shift :], None)]


def permute_tokens(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Rows of `tokens` `[T, C]` in the given order; its gradient is the inverse permutation, not a scatter."""
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
