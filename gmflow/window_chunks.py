"""What attention within windows is computed in: on a CPU a few windows at a time, elsewhere all of them.

Plainly, each step of an attention layer is a tensor of the size of the features, written to fresh memory, read once,
and kept for the backward pass. In chunks, a few windows go through all steps while they are in a CPU's cache. An
accelerator has no such cache, and asking for each operation takes its time: there the chunk is all tokens, and only
attention itself is one of windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gmflow.attention import Crossing, chunk_size, computes_in_chunks, row_slices, softmax_backward, softmax_weights
from gmflow.layer_norm import Statistics, layer_norm, layer_norm_backward
from gmflow.scratch import Matrix, Scratch, add_product, put_product

FUSED_TOKENS = 1 << 13
"""Tokens of several windows that go through a layer at a time on a CPU where its attention is fused."""


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
        regions: as in `WindowGroup`.
    """

    source: int
    partner: int
    windows: int
    length: int
    regions: Tensor | None


@dataclass(frozen=True)
class Windows:
    """Windows of a pairing that are attended at a time.

    Attributes:
        source: their tokens, which attend.
        target: the tokens that those attend to.
        number: how many windows.
        rows: of each window, attended in turn: all of them where there are several windows, or attention is fused.
        crossing: the penalties between regions, where windows have any.
    """

    source: slice
    target: slice
    number: int
    rows: list[slice]
    crossing: Crossing | None


@dataclass(frozen=True)
class Chunk:
    """Tokens that go through a layer at a time, those of some windows: on a CPU of a few, else of all there are."""

    tokens: slice
    windows: list[Windows]

    def place(self, windows: Windows) -> slice:
        """Of the tokens of these windows among those of the chunk."""
        return slice(windows.source.start - self.tokens.start, windows.source.stop - self.tokens.start)


def chunks(pairings: list[Pairing], device: torch.device, *, fused: bool = False) -> Iterator[Chunk]:
    """All tokens in turn, with the windows that they are of."""
    windows = [part for pairing in pairings for part in _windows(pairing, pairings, device, fused)]
    if computes_in_chunks(device):
        yield from (Chunk(part.source, [part]) for part in windows)
    else:
        yield Chunk(slice(0, sum(pairing.windows * pairing.length for pairing in pairings)), windows)


def _windows(pairing: Pairing, pairings: list[Pairing], device: torch.device, fused: bool) -> Iterator[Windows]:
    """Many whole windows for the fused operation, else as many rows as there may be scores of."""
    length, crossing = pairing.length, None if pairing.regions is None else Crossing.of(pairing.regions[0])
    if not fused:
        many, rows = chunk_size(length, length, device)
    elif computes_in_chunks(device):
        many, rows = max(1, FUSED_TOKENS // length), length
    else:
        many, rows = pairing.windows, length
    for first in range(0, pairing.windows, many):
        number = min(many, pairing.windows - first)
        source, target = (
            slice(start + first * length, start + (first + number) * length)
            for start in (pairing.source, pairings[pairing.partner].source)
        )
        yield Windows(source, target, number, row_slices(length, rows), crossing)


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

    def attend(self, windows: Windows, scratch: Scratch, out: Tensor) -> None:
        """Write what the queries attend to, `[n, L, C]`."""
        for rows in windows.rows:
            torch.bmm(self.weights(rows, windows.crossing, scratch), self.value, out=out[:, rows])


class Messages:
    """LayerNorm(merge · attended values), added to the tokens that attended or not.

    Args:
        merge: in the type that values are multiplied in.
        scale: of the LayerNorm, `[C]`.
        shift: of the LayerNorm, `[C]`.
        onto_source: they are added.

    Attributes:
        statistics: of the LayerNorm, chunk after chunk, for `MessageGradients`.
    """

    def __init__(self, merge: Matrix, scale: Tensor, shift: Tensor, *, onto_source: bool) -> None:
        self._merge, self._scale, self._shift, self._onto_source = merge, scale, shift, onto_source
        self._merged = Scratch(scale)
        self.statistics: list[Tensor] = []

    def write(self, attended: Tensor, source: Tensor, out: Tensor) -> None:
        """Those of a chunk: values that were attended, the tokens that did, and where to write, `[n*L, C]` each."""
        merged = self._merged.view(*source.shape)
        put_product(merged, attended, self._merge.forth)
        message, statistics = layer_norm(merged, self._scale, self._shift)
        self.statistics += statistics
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

    def __init__(self, merge: Matrix, scale: Tensor, shift: Tensor, statistics: list[Tensor]) -> None:
        self._factor, self._scale, self._shift = merge, scale, shift
        self._statistics = map(Statistics, statistics[::2], statistics[1::2])
        self.merge = torch.zeros_like(merge.back, dtype=scale.dtype)
        self.scale, self.shift = torch.zeros_like(scale), torch.zeros_like(shift)
        self._merged, self._weights, self._for_weights = Scratch(scale), Scratch(merge.back), Scratch(merge.back)

    def of_attended(self, gradient: Tensor, attended: Tensor) -> Tensor:
        """From the gradient of the next chunk's messages to that of the values they come from: `[n*L, C]` each."""
        merged = self._merged.view(*gradient.shape)
        put_product(merged, attended, self._factor.forth)
        of_norm = next(self._statistics), self._scale, self._shift
        for_merged, for_scale, for_shift = layer_norm_backward(gradient, merged, *of_norm)
        self.scale += for_scale
        self.shift += for_shift
        for_merged = for_merged.to(attended.dtype)
        add_product(self.merge, for_merged.T, attended)
        return for_merged @ self._factor.back

    def through_attention(
        self,
        for_attended: Tensor,
        meeting: Meeting,
        windows: Windows,
        for_query: Tensor,
        for_key: Tensor,
        for_value: Tensor,
    ) -> None:
        """From the gradient of attended values to those of queries, keys and values but for the scale of scores.

        All tensors are `[n, L, C]`; the last three are written, and where keys are the values, the last two are one.
        """
        for rows in windows.rows:
            weights = meeting.weights(rows, windows.crossing, self._weights)
            upper = for_attended[:, rows]
            for_weights = self._for_weights.view(*weights.shape)
            torch.bmm(upper, meeting.value.transpose(1, 2), out=for_weights)
            for_scores = softmax_backward(for_weights, weights)
            torch.bmm(for_scores, meeting.key, out=for_query[:, rows])
            gather = put_product if rows is windows.rows[0] else add_product
            gather(for_key, for_scores.transpose(1, 2), meeting.query[:, rows])
            if for_value is for_key:
                gather = add_product
            gather(for_value, weights.transpose(1, 2), upper)
