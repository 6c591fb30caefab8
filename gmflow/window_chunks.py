"""What attention within windows is computed in on a CPU: a few windows at a time.

Plainly, each step of an attention layer is a tensor of the size of the features, written to fresh memory, read once,
and kept for the backward pass. In chunks, a few windows go through all steps while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gmflow.attention import Crossing, chunk_size, row_slices
from gmflow.layer_norm import layer_norm_backward
from gmflow.scratch import Matrix, Scratch, add_product

FUSED_TOKENS = 1 << 13
"""Tokens of several windows that go through a layer at a time where its attention is fused."""


@dataclass(frozen=True)
class Pairing:
    """Consecutive windows that attend to other consecutive windows.

    Attributes:
        source: first token of the first window that attends.
        partner: number of the pairing whose `source` are the windows that are attended to.
        windows: how many.
        length: tokens in each.
        regions: as in `WindowGroup`, and so is `cut`.
    """

    source: int
    partner: int
    windows: int
    length: int
    regions: Tensor | None
    cut: bool


@dataclass(frozen=True)
class Chunk:
    """Some windows of a pairing, as slices of tokens, and the rows of them that are attended in turn."""

    source: slice
    target: slice
    windows: int
    rows: list[slice]
    """Of each window: all of them where there are several windows, or attention is fused."""
    crossing: Crossing | None


def chunks(pairings: list[Pairing], *, fused: bool = False) -> Iterator[Chunk]:
    """All windows in turn: many whole ones for the fused operation, else as many rows as there may be scores of."""
    for pairing in pairings:
        length, crossing = pairing.length, None if pairing.regions is None else Crossing.of(pairing.regions[0])
        many, rows = (max(1, FUSED_TOKENS // length), length) if fused else chunk_size(length, length)
        for first in range(0, pairing.windows, many):
            windows = min(many, pairing.windows - first)
            source, target = (
                slice(start + first * length, start + (first + windows) * length)
                for start in (pairing.source, pairings[pairing.partner].source)
            )
            yield Chunk(source, target, windows, row_slices(length, rows), crossing)


def attend_to_themselves(pairings: list[Pairing]) -> bool:
    """Whether every window attends to the tokens in its own place."""
    return all(pairing.partner == number for number, pairing in enumerate(pairings))


def rows_of_chunks(like: Tensor, dtype: torch.dtype, *, kept: bool) -> Callable[[slice], Tensor]:
    """Where to put rows `[n, C]` of a chunk: their place in memory for all of `like`, or memory that all chunks use."""
    if kept:
        return torch.empty_like(like, dtype=dtype).__getitem__
    scratch = Scratch(like.new_empty(0, dtype=dtype))
    return lambda chunk: scratch.view(chunk.stop - chunk.start, like.shape[1])


class MergeGradients:
    """The way back through the merge and the LayerNorm of messages, and its sums over chunks.

    Attributes:
        merge: sum of the gradients of the matrix, `[C, C]`.
        scale: of the LayerNorm's scale, `[C]`.
        shift: of the LayerNorm's shift, `[C]`.
    """

    def __init__(self, merge: Matrix, scale: Tensor, shift: Tensor) -> None:
        self._factor, self._scale, self._shift = merge, scale, shift
        self.merge = torch.zeros_like(merge.back, dtype=scale.dtype)
        self.scale, self.shift = torch.zeros_like(scale), torch.zeros_like(shift)

    def through(self, gradient: Tensor, attended: Tensor) -> Tensor:
        """From the gradient of messages to that of the attended values they come from: `[n, C]` each."""
        merged = (attended @ self._factor.forth).to(gradient.dtype)
        for_merged, for_scale, for_shift = layer_norm_backward(gradient, merged, self._scale, self._shift)
        self.scale += for_scale
        self.shift += for_shift
        for_merged = for_merged.to(attended.dtype)
        add_product(self.merge, for_merged.T, attended)
        return for_merged @ self._factor.back
