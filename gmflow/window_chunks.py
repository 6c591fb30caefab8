"""What attention within windows is computed in on a CPU: a few windows at a time.

Plainly, each step of an attention layer is a tensor of the size of the features, written to fresh memory, read once,
and kept for the backward pass. In chunks, a few windows go through all steps while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow.attention import Crossing, chunk_size, row_slices, softmax_backward, softmax_weights
from gmflow.layer_norm import layer_norm_backward
from gmflow.scratch import Matrix, Scratch, add_product, put_product

FUSED_TOKENS = 1 << 13
"""Tokens of several windows that go through a layer at a time where its attention is fused."""


class AttentionWeights(NamedTuple):
    """Parameters of one attention layer: matrices `[C, C]`, and LayerNorm's scale and shift `[C]`."""

    to_query: Tensor
    to_key: Tensor
    to_value: Tensor
    merge: Tensor
    scale: Tensor
    shift: Tensor


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


class Meeting(NamedTuple):
    """The queries of a chunk's windows, and the keys and values they meet: `[n, L, C]` each."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    """Of the scores."""

    def weights(self, rows: slice, crossing: Crossing | None, scratch: Scratch) -> Tensor:
        """Of every key for these rows of the windows: `[n, l, L]`."""
        return softmax_weights(self.query[:, rows], self.key, self.scale, scratch, crossing, rows)

    def attend(self, chunk: Chunk, scratch: Scratch, out: Tensor) -> None:
        """Write what the queries attend to, `[n, L, C]`."""
        for rows in chunk.rows:
            torch.bmm(self.weights(rows, chunk.crossing, scratch), self.value, out=out[:, rows])


class Messages:
    """LayerNorm(merge · attended values), added to the tokens that attended or not.

    Args:
        merge: in the type that values are multiplied in.
        scale: of the LayerNorm, `[C]`.
        shift: of the LayerNorm, `[C]`.
        onto_source: they are added.
    """

    def __init__(self, merge: Matrix, scale: Tensor, shift: Tensor, *, onto_source: bool) -> None:
        self._merge, self._scale, self._shift, self._onto_source = merge, scale, shift, onto_source
        self._merged = Scratch(merge.back)

    def write(self, attended: Tensor, source: Tensor, out: Tensor) -> None:
        """Those of a chunk: values that were attended, the tokens that did, and where to write, `[n*L, C]` each."""
        update = torch.mm(attended, self._merge.forth, out=self._merged.view(*source.shape))
        message = F.layer_norm(update.to(source.dtype), self._scale.shape, self._scale, self._shift)
        if self._onto_source:
            torch.add(source, message, out=out)
        else:
            out.copy_(message)


class MessageGradients:
    """The way back from messages to what they are of, and the sums over chunks of the gradients of the parameters.

    Multiplies in the type of `merge`.

    Attributes:
        merge: sum of the gradients of the matrix, `[C, C]`.
        scale: of the LayerNorm's scale, `[C]`.
        shift: of the LayerNorm's shift, `[C]`.
    """

    def __init__(self, merge: Matrix, scale: Tensor, shift: Tensor) -> None:
        self._factor, self._scale, self._shift = merge, scale, shift
        self.merge = torch.zeros_like(merge.back, dtype=scale.dtype)
        self.scale, self.shift = torch.zeros_like(scale), torch.zeros_like(shift)
        self._weights, self._for_weights = Scratch(merge.back), Scratch(merge.back)

    def through_attention(
        self,
        gradient: Tensor,
        attended: Tensor,
        meeting: Meeting,
        chunk: Chunk,
        for_query: Tensor,
        for_key: Tensor,
        for_value: Tensor,
    ) -> None:
        """From the gradient of a chunk's messages to those of queries, keys and values but for the scale of scores.

        All tensors are `[n, L, C]`; the last three are written, and where keys are the values, the last two are one.
        """
        for rows in chunk.rows:
            weights = meeting.weights(rows, chunk.crossing, self._weights)
            values = attended[:, rows]
            for_values = self._through_merge(gradient[:, rows].flatten(0, 1), values.flatten(0, 1)).view(values.shape)
            for_weights = self._for_weights.view(*weights.shape)
            torch.bmm(for_values, meeting.value.transpose(1, 2), out=for_weights)
            for_scores = softmax_backward(for_weights, weights)
            torch.bmm(for_scores, meeting.key, out=for_query[:, rows])
            gather = put_product if rows is chunk.rows[0] else add_product
            gather(for_key, for_scores.transpose(1, 2), meeting.query[:, rows])
            if for_value is for_key:
                gather = add_product
            gather(for_value, weights.transpose(1, 2), for_values)

    def _through_merge(self, gradient: Tensor, attended: Tensor) -> Tensor:
        """From the gradient of messages to that of the attended values they come from: `[n, C]` each."""
        merged = (attended @ self._factor.forth).to(gradient.dtype)
        for_merged, for_scale, for_shift = layer_norm_backward(gradient, merged, self._scale, self._shift)
        self.scale += for_scale
        self.shift += for_shift
        for_merged = for_merged.to(attended.dtype)
        add_product(self.merge, for_merged.T, attended)
        return for_merged @ self._factor.back
