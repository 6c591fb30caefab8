"""A whole attention layer inside windows: query, key and value projections, attention, merge, LayerNorm, residual.

Plainly, each of its steps is a tensor of the size of the features, written to fresh memory, read once, and kept for the
backward pass. Here a few windows at a time go through all steps while they are in the cache. Kept are the layer's
inputs, which the residual stream keeps anyway, the queries and what they attended to; keys, values and the rest are
computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.attention import (
    CROSSING_PENALTY,
    Crossing,
    attention,
    chunk_size,
    computes_in_chunks,
    fused_attention,
    row_slices,
    softmax_backward,
    softmax_weights,
)
from gmflow.eager import outside_graphs
from gmflow.layer_norm import layer_norm_backward
from gmflow.scratch import Scratch, add_product, put_product

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
        regions: as in `WindowGroup`, and so is `fused`.
    """

    source: int
    partner: int
    windows: int
    length: int
    regions: Tensor | None
    fused: bool


def window_attention(
    source: Tensor, target: Tensor, weights: AttentionWeights, pairings: list[Pairing], *, onto_source: bool
) -> Tensor:
    """LayerNorm(merge · softmax(query · key / √C) · value) within windows.

    Args:
        source: tokens that attend, `[T, C]` in window order; queries are of them.
        target: tokens that are attended to, `[T, C]` in window order; keys and values are of them.
        weights: of the layer.
        pairings: every window once as a source, in order, and once as a target.
        onto_source: add the result to the source.

    Returns:
        `[T, C]`.
    """
    if computes_in_chunks(source.device):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else source.dtype
        learns = torch.is_grad_enabled()
        out: Tensor = _chunked_window_attention(source, target, *weights, pairings, onto_source, dtype, learns)
        return out
    return _fused(source, target, weights, pairings, onto_source)


def _fused(
    source: Tensor, target: Tensor, weights: AttentionWeights, pairings: list[Pairing], onto_source: bool
) -> Tensor:
    """Through the fused kernels; a grid built for them has windows with regions in an exported program only."""
    query, key, value = _projected(source, target, weights)
    # Split, not sliced one by one: the gradient of a slice is a tensor of the whole, to be zeroed and added up.
    sizes = [pairing.windows * pairing.length for pairing in pairings]
    queries, keys, values = (torch.split(one, sizes) for one in (query, key, value))
    attend = fused_attention if query.element_size() == 2 else attention
    parts: list[Tensor] = []
    for pairing, own in zip(pairings, queries, strict=True):
        shape = (pairing.windows, pairing.length, source.shape[1])
        other = keys[pairing.partner].view(shape), values[pairing.partner].view(shape)
        if pairing.regions is None:
            attended = attend(own.view(shape), *other)
        else:
            attended = _attended_within(pairing.regions, own.view(shape), *other)
        parts.append(attended.flatten(0, 1))
    merged = F.linear(torch.cat(parts), weights.merge)
    message = F.layer_norm(merged, merged.shape[1:], weights.scale, weights.shift)
    return source + message if onto_source else message


def _attended_within(regions: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention within the regions of windows, without a mask, which would be of the size of all scores.

    Four channels more of queries and keys tell the regions apart: the scores of pairs of one region have
    `-CROSSING_PENALTY` more than others', as in the reference, where those of different regions have as much less.
    """
    scale = query.shape[-1] ** -0.5
    mark = F.one_hot(regions, 4).to(query.dtype) * (-CROSSING_PENALTY / scale) ** 0.5  # [n, L, 4]
    marks = mark.repeat(query.shape[0] // len(regions), 1, 1)  # [N, L, 4]
    return fused_attention(torch.cat([query, marks], dim=2), torch.cat([key, marks], dim=2), value, scale)


def _projected(source: Tensor, target: Tensor, weights: AttentionWeights) -> tuple[Tensor, ...]:
    """Queries, keys and values `[T, C]`, in one product where they are of the same tokens and otherwise in two."""
    if target is source:
        matrices = torch.cat([weights.to_query, weights.to_key, weights.to_value])  # [3C, C]
        return F.linear(source, matrices).chunk(3, dim=1)
    key, value = F.linear(target, torch.cat([weights.to_key, weights.to_value])).chunk(2, dim=1)
    return F.linear(source, weights.to_query), key, value


@dataclass(frozen=True)
class _Chunk:
    """Some windows of a pairing, as slices of tokens, and the rows of them that are attended in turn."""

    source: slice
    target: slice
    windows: int
    rows: list[slice]
    """Of each window: all of them where there are several windows, or they are fused."""
    crossing: Crossing | None
    fused: bool


def _chunks(pairings: list[Pairing], *, backward: bool = False) -> Iterator[_Chunk]:
    """On the way back no windows are fused: in chunks the gradients of small ones take less time."""
    for pairing in pairings:
        length, crossing = pairing.length, None if pairing.regions is None else Crossing.of(pairing.regions[0])
        fused = pairing.fused and not backward
        many, rows = (max(1, FUSED_TOKENS // length), length) if fused else chunk_size(length, length)
        for first in range(0, pairing.windows, many):
            windows = min(many, pairing.windows - first)
            source, target = (
                slice(start + first * length, start + (first + windows) * length)
                for start in (pairing.source, pairings[pairing.partner].source)
            )
            yield _Chunk(source, target, windows, row_slices(length, rows), crossing, fused)


class _Factors(NamedTuple):
    """The layer's matrices in the type they are multiplied in, and how scores come about."""

    to_query: Tensor
    to_key_and_value: Tensor
    """`[2C, C]`: one product gives both."""
    merge: Tensor
    before: float
    """Scale of the queries: in 16 bits, so that scores need not be rounded twice."""
    after: float
    """Scale of the scores: in full precision, which is the reference's order."""

    @classmethod
    def of(cls, to_query: Tensor, to_key: Tensor, to_value: Tensor, merge: Tensor, dtype: torch.dtype) -> _Factors:
        scale = to_query.shape[1] ** -0.5
        before, after = (1.0, scale) if dtype == to_query.dtype else (scale, 1.0)
        scaled = to_query if before == 1.0 else to_query * before
        both = torch.cat([to_key, to_value]).to(dtype)
        return cls(scaled.to(dtype), both, merge.to(dtype), before, after)


class _Meeting(NamedTuple):
    """The queries of some windows, and the keys and values they meet."""

    target: Tensor
    """What keys are the product of: `[n*L, C]`."""
    query: Tensor
    """`[n, L, C]`, as key and value are."""
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, query: Tensor, target: Tensor, windows: int, factors: _Factors, projected: Scratch) -> _Meeting:
        """Of queries and of tokens of the target, `[n*L, C]` each."""
        channels = target.shape[1]
        target = target.to(factors.merge.dtype)
        pair = torch.mm(target, factors.to_key_and_value.T, out=projected.view(len(target), 2 * channels))
        key, value = pair.view(windows, -1, 2, channels).unbind(2)
        return cls(target, query.view(windows, -1, channels), key, value)

    def weights(self, rows: slice, chunk: _Chunk, scale: float, scratch: Scratch) -> Tensor:
        """Of every key for these rows of the windows: `[n, l, L]`."""
        return softmax_weights(self.query[:, rows], self.key, scale, scratch, chunk.crossing, rows)


def _centred(target: Tensor, windows: int, dtype: torch.dtype) -> Tensor:
    """Where scores are rounded to 16 bits: tokens `[n*L, C]` less their window's mean, for keys and values.

    To a softmax, what all of a query's scores have in common is nothing, nor is what all of their gradients have in
    common: it would only be rounded.
    """
    if dtype == target.dtype:
        return target
    apart = target.view(windows, -1, target.shape[1])
    return (apart - apart.mean(dim=1, keepdim=True)).flatten(0, 1)


class _WindowAttention(torch.autograd.Function):
    """Multiplies in `dtype`; sums over chunks, normalises and adds in that of `source`."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        target: Tensor,
        to_query: Tensor,
        to_key: Tensor,
        to_value: Tensor,
        merge: Tensor,
        scale: Tensor,
        shift: Tensor,
        pairings: list[Pairing],
        onto_source: bool,
        dtype: torch.dtype,
        learns: bool,
    ) -> Tensor:
        factors = _Factors.of(to_query, to_key, to_value, merge, dtype)
        out = torch.empty_like(source)
        queries, attended = _memory(source, dtype, whole=learns), _memory(source, dtype, whole=learns)
        projected, merged, scores = (Scratch(factors.merge) for _ in range(3))
        for chunk in _chunks(pairings):
            own = source[chunk.source]
            query = torch.mm(own.to(dtype), factors.to_query.T, out=queries(chunk.source))
            meeting = _Meeting.of(query, target[chunk.target], chunk.windows, factors, projected)
            if chunk.fused:
                values = fused_attention(meeting.query, meeting.key, meeting.value, factors.after)
                if learns:
                    attended(chunk.source).view(values.shape).copy_(values)
            else:
                values = attended(chunk.source).view(meeting.query.shape)
                for rows in chunk.rows:
                    weights = meeting.weights(rows, chunk, factors.after, scores)
                    torch.bmm(weights, meeting.value, out=values[:, rows])
            update = torch.mm(values.flatten(0, 1), factors.merge.T, out=merged.view(*own.shape))
            message = F.layer_norm(update.to(source.dtype), scale.shape, scale, shift)
            if onto_source:
                torch.add(own, message, out=out[chunk.source])
            else:
                out[chunk.source] = message
        if learns:
            everything = slice(len(source))
            kept = queries(everything), attended(everything)
            ctx.save_for_backward(source, target, *kept, to_query, to_key, to_value, merge, scale, shift)
            ctx.pairings, ctx.onto_source = pairings, onto_source
            ctx.to_itself = target is source and all(one.partner == number for number, one in enumerate(pairings))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, target, queries, attended, to_query, to_key, to_value, merge, scale, shift = ctx.saved_tensors
        dtype, channels = queries.dtype, source.shape[1]
        factors = _Factors.of(to_query, to_key, to_value, merge, dtype)
        gradients = _Gradients(factors, scale, shift)
        for_source = torch.empty_like(source)
        for_target = for_source if ctx.to_itself else torch.empty_like(target)
        projected = Scratch(factors.merge)
        for chunk in _chunks(ctx.pairings, backward=True):
            own, other, upper = source[chunk.source], target[chunk.target], gradient[chunk.source]
            centred = _centred(other, chunk.windows, dtype)
            meeting = _Meeting.of(queries[chunk.source], centred, chunk.windows, factors, projected)
            for_query, for_key, for_value = gradients.through_attention(upper, meeting, attended[chunk.source], chunk)
            gradients.of_projections(for_query, for_key, for_value, meeting, own, other)
            for_own, for_other = for_source[chunk.source], for_target[chunk.target]
            put_product(for_own, for_query, factors.to_query)
            if ctx.onto_source:
                for_own += upper
            (add_product if ctx.to_itself else put_product)(for_other, for_key, factors.to_key_and_value[:channels])
            add_product(for_other, for_value, factors.to_key_and_value[channels:])
        of_tokens = (for_source, None) if ctx.to_itself else (for_source, for_target)
        return *of_tokens, *gradients.of_parameters(), None, None, None, None


def _memory(source: Tensor, dtype: torch.dtype, *, whole: bool) -> Callable[[slice], Tensor]:
    """Where to put the rows of a chunk: its place in memory for all tokens, or memory that all chunks use."""
    if whole:
        return torch.empty_like(source, dtype=dtype).__getitem__
    scratch = Scratch(source.new_empty(0, dtype=dtype))
    return lambda chunk: scratch.view(chunk.stop - chunk.start, source.shape[1])


class _Gradients:
    """The way back through the chunks of a layer, and the sums over them of its parameters' gradients."""

    def __init__(self, factors: _Factors, scale: Tensor, shift: Tensor) -> None:
        self._factors, self._scale, self._shift = factors, scale, shift
        self._to_query, self._to_key, self._to_value, self._merge = (
            torch.zeros_like(factors.merge, dtype=scale.dtype) for _ in range(4)
        )
        self._of_scale, self._of_shift = torch.zeros_like(scale), torch.zeros_like(shift)
        self._scores, self._for_scores, self._of_queries, self._whole = (Scratch(factors.merge) for _ in range(4))
        self._sums = Scratch(scale)

    def through_attention(self, gradient: Tensor, meeting: _Meeting, attended: Tensor, chunk: _Chunk) -> list[Tensor]:
        """From the gradient of the messages to those of query, key and value: `[n*L, C]` each."""
        factors, shape = self._factors, meeting.query.shape
        gradient, attended = gradient.view(shape), attended.view(shape)
        for_query = self._of_queries.view(*shape)
        # Products of parts are summed in full precision; that of a whole window is the sum.
        for_key, for_value = (self._whole if len(chunk.rows) == 1 else self._sums).view(2, *shape)
        for rows in chunk.rows:
            gather = put_product if rows is chunk.rows[0] else add_product
            weights = meeting.weights(rows, chunk, factors.after, self._scores)
            values = attended[:, rows]
            for_values = self._through_merge(gradient[:, rows].flatten(0, 1), values.flatten(0, 1)).view(values.shape)
            for_weights = self._for_scores.view(*weights.shape)
            torch.bmm(for_values, meeting.value.transpose(1, 2), out=for_weights)
            for_scores = softmax_backward(for_weights, weights)
            torch.bmm(for_scores, meeting.key, out=for_query[:, rows])
            gather(for_key, for_scores.transpose(1, 2), meeting.query[:, rows])
            gather(for_value, weights.transpose(1, 2), for_values)
        if factors.after != 1.0:
            for_query *= factors.after
            for_key *= factors.after
        return [one.flatten(0, 1).to(factors.merge.dtype) for one in (for_query, for_key, for_value)]

    def _through_merge(self, gradient: Tensor, values: Tensor) -> Tensor:
        """From the gradient of messages to that of the attended values: `[n*l, C]` each."""
        merged = (values @ self._factors.merge.T).to(gradient.dtype)
        for_merged, for_scale, for_shift = layer_norm_backward(gradient, merged, self._scale, self._shift)
        self._of_scale += for_scale
        self._of_shift += for_shift
        for_merged = for_merged.to(values.dtype)
        add_product(self._merge, for_merged.T, values)
        return for_merged @ self._factors.merge

    def of_projections(
        self, for_query: Tensor, for_key: Tensor, for_value: Tensor, meeting: _Meeting, source: Tensor, target: Tensor
    ) -> None:
        """Adds what these gradients of a chunk `[n*L, C]` say of the matrices; values are of the whole `target`."""
        dtype = for_query.dtype
        add_product(self._to_query, for_query.T, source.to(dtype))
        add_product(self._to_key, for_key.T, meeting.target)
        add_product(self._to_value, for_value.T, target.to(dtype))

    def of_parameters(self) -> tuple[Tensor, ...]:
        """The sums, in the order of `AttentionWeights`."""
        for_query = self._to_query * self._factors.before
        return for_query, self._to_key, self._to_value, self._merge, self._of_scale, self._of_shift


_chunked_window_attention = outside_graphs(_WindowAttention.apply)
