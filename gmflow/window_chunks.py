"""The chunks in which attention within windows is computed: on a CPU a few windows at a time, elsewhere all of them.

Computed in the plain way, every step of an attention layer gives a tensor of the size of the features, which is written
to fresh memory, read once, and kept for the backward pass. In chunks, a few windows go through all steps while they are
in a CPU's cache. An accelerator has no such cache, and launching each operation takes time: there one chunk holds all
tokens, and only attention itself goes by windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gmflow.attention import Crossing, chunk_size, row_slices, runs_eagerly_on_cpu, softmax_backward, softmax_weights
from gmflow.layer_norm import Statistics, layer_norm, layer_norm_backward
from gmflow.scratch import Matrix, Scratch, add_product, put_product

FUSED_TOKENS = 1 << 13
"""Tokens of several windows that a CPU takes through a layer at a time, at most, where attention is fused."""


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
    """Consecutive windows that attend to as many other consecutive windows.

    Attributes:
        source: index of the first token of the windows that attend.
        partner: index, in the list of pairings, of the pairing whose windows are attended to.
        windows: number of windows.
        length: tokens in each window.
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
        source: the tokens that attend.
        target: the tokens that they attend to.
        number: number of windows.
        rows: slices of a window's queries that are attended one after the other; one slice of all where several windows
            go at a time or attention is fused.
        crossing: the penalties between regions; None where the windows have no regions.
    """

    source: slice
    target: slice
    number: int
    rows: list[slice]
    crossing: Crossing | None


@dataclass(frozen=True)
class Chunk:
    """Tokens that go through a layer at a time, with their windows: on a CPU a few windows, elsewhere all."""

    tokens: slice
    windows: list[Windows]

    def place(self, windows: Windows) -> slice:
        """Where the tokens of `windows` lie among those of this chunk."""
        return slice(windows.source.start - self.tokens.start, windows.source.stop - self.tokens.start)


def chunks(pairings: list[Pairing], device: torch.device, *, fused: bool = False) -> Iterator[Chunk]:
    """All tokens in turn, with their windows; `fused` where attention is PyTorch's fused operation.

    On a CPU they depend on the number of threads that PyTorch computes with at the moment. So a backward pass takes the
    chunks that its forward pass made: then its result does not depend on whether that number has changed in between.
    """
    windows = [part for pairing in pairings for part in _windows(pairing, pairings, device, fused)]
    if runs_eagerly_on_cpu(device):
        yield from (Chunk(part.source, [part]) for part in windows)
    else:
        yield Chunk(slice(0, sum(pairing.windows * pairing.length for pairing in pairings)), windows)


def _windows(pairing: Pairing, pairings: list[Pairing], device: torch.device, fused: bool) -> Iterator[Windows]:
    """The windows of a pairing in parts: of whole windows for the fused operation, otherwise as `chunk_size` has it."""
    length, crossing = pairing.length, None if pairing.regions is None else Crossing.of(pairing.regions[0])
    if not fused:
        many, rows = chunk_size(length, length, device)
    elif runs_eagerly_on_cpu(device):
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
    """Whether every window attends to the window in its own place."""
    return all(pairing.partner == number for number, pairing in enumerate(pairings))


def rows_of_chunks(like: Tensor, dtype: torch.dtype, *, kept: bool) -> Callable[[slice], Tensor]:
    """A function that gives the memory for a chunk's rows `[n, C]`.

    That is a slice of one tensor like `like` where they are `kept` for the backward pass, otherwise scratch memory that
    every chunk overwrites.
    """
    if kept:
        return torch.empty_like(like, dtype=dtype).__getitem__
    scratch = Scratch(like.new_empty(0, dtype=dtype))
    return lambda chunk: scratch.view(chunk.stop - chunk.start, like.shape[1])


class Meeting(NamedTuple):
    """The queries of some windows, and the keys and values that they attend to: `[n, L, C]` each."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    """Factor of the scores."""

    def weights(self, rows: slice, crossing: Crossing | None, scratch: Scratch) -> Tensor:
        """Softmax weights of every key, for these rows of the queries: `[n, l, L]`."""
        return softmax_weights(self.query[:, rows], self.key, self.scale, scratch, crossing, rows)

    def attend(self, windows: Windows, scratch: Scratch, out: Tensor) -> None:
        """Write softmax(scores) · value into `out`, `[n, L, C]`."""
        for rows in windows.rows:
            torch.bmm(self.weights(rows, windows.crossing, scratch), self.value, out=out[:, rows])


class Messages:
    """Messages, LayerNorm(merge · attended values), of one chunk after the other.

    Args:
        merge: the matrix, in the type that values are multiplied in.
        scale: scale of the LayerNorm, `[C]`.
        shift: shift of the LayerNorm, `[C]`.
        onto_source: add the messages to the tokens that attended.
    """

    def __init__(self, merge: Matrix, scale: Tensor, shift: Tensor, *, onto_source: bool) -> None:
        self._merge, self._scale, self._shift, self._onto_source = merge, scale, shift, onto_source
        self._merged = Scratch(scale)
        self._statistics: list[Statistics] = []

    def write(self, attended: Tensor, source: Tensor, out: Tensor) -> None:
        """Write the next chunk's messages into `out`, from attended values and the tokens that attended.

        All are `[n*L, C]`.
        """
        merged = self._merged.view(*source.shape)
        put_product(merged, attended, self._merge.forth)
        message, statistics = layer_norm(merged, self._scale, self._shift)
        self._statistics.append(statistics)
        if self._onto_source:
            torch.add(source, message, out=out)
        else:
            out.copy_(message)

    @property
    def statistics(self) -> Statistics:
        """The LayerNorm's, of all tokens whose messages were written, for `MessageGradients`: `[T, 1]` each."""
        means, reciprocal_stds = zip(*self._statistics, strict=True)
        return Statistics(torch.cat(means), torch.cat(reciprocal_stds))


class MessageGradients:
    """The backward pass of messages, chunk by chunk; adds up the gradients of the parameters over the chunks.

    Products are in the type of `merge`.

    Args:
        merge: the matrix, in the type of products.
        scale: scale of the LayerNorm, `[C]`.
        shift: shift of the LayerNorm, `[C]`.
        statistics: `Messages.statistics`.

    Attributes:
        merge: sum of the gradients of the matrix, `[C, C]`.
        scale: sum of the gradients of the LayerNorm's scale, `[C]`.
        shift: sum of the gradients of the LayerNorm's shift, `[C]`.
    """

    def __init__(self, merge: Matrix, scale: Tensor, shift: Tensor, statistics: Statistics) -> None:
        self._factor, self._scale, self._shift, self._statistics = merge, scale, shift, statistics
        self.merge = torch.zeros_like(merge.back, dtype=scale.dtype)
        self.scale, self.shift = torch.zeros_like(scale), torch.zeros_like(shift)
        self._merged, self._weights, self._for_weights = Scratch(scale), Scratch(merge.back), Scratch(merge.back)

    def of_attended(self, gradient: Tensor, attended: Tensor, tokens: slice) -> Tensor:
        """From the gradient of the messages of a chunk's `tokens` to that of the attended values: `[n*L, C]` each."""
        merged = self._merged.view(*gradient.shape)
        put_product(merged, attended, self._factor.forth)
        statistics = Statistics(*(one[tokens] for one in self._statistics))
        for_merged, for_scale, for_shift = layer_norm_backward(gradient, merged, statistics, self._scale, self._shift)
        self.scale += for_scale
        self.shift += for_shift
        for_merged = for_merged.to(attended.dtype)
        add_product(self.merge, for_merged.T, attended)
        # `out` keeps the type also where the caller's autocast is still on in the backward pass.
        return torch.mm(for_merged, self._factor.back, out=torch.empty_like(for_merged))

    def through_attention(
        self,
        for_attended: Tensor,
        meeting: Meeting,
        windows: Windows,
        for_query: Tensor,
        for_key: Tensor,
        for_value: Tensor,
    ) -> None:
        """From the gradient of attended values to those of queries, keys and values.

        The gradients of queries and keys are not yet multiplied by the scale of the scores. All tensors are
        `[n, L, C]`. The last three are written; where the keys are the values, the last two must be one tensor.
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
