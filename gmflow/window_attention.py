"""A whole attention layer inside windows: query, key and value projections, attention, merge, LayerNorm, residual.

Plainly, each of its steps is a tensor of the size of the features, written to fresh memory, read once, and kept for the
backward pass. Here a few windows at a time go through all steps while they are in the cache; only the layer's inputs
are kept, which the residual stream keeps anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.attention import attention, chunk_size, computes_in_chunks, scratch_scores, softmax_weights
from gmflow.eager import outside_graphs
from gmflow.layer_norm import layer_norm_backward


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
        target: first token of the first window that is attended to.
        windows: how many.
        length: tokens in each.
        regions: as in `WindowGroup`.
    """

    source: int
    target: int
    windows: int
    length: int
    regions: Tensor | None


def window_attention(
    source: Tensor, target: Tensor, weights: AttentionWeights, pairings: list[Pairing], *, onto_source: bool
) -> Tensor:
    """LayerNorm(merge · softmax(query · key / √C) · value) within windows.

    Args:
        source: tokens that attend, `[T, C]` in window order; queries are of them.
        target: tokens that are attended to, `[T, C]` in window order; keys and values are of them.
        weights: of the layer.
        pairings: every window once as a source and once as a target.
        onto_source: add the result to the source.

    Returns:
        `[T, C]`.
    """
    if computes_in_chunks(source):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else source.dtype
        out: Tensor = _chunked_window_attention(source, target, *weights, pairings, onto_source, dtype)
        return out
    return _fused(source, target, weights, pairings, onto_source)


def _fused(
    source: Tensor, target: Tensor, weights: AttentionWeights, pairings: list[Pairing], onto_source: bool
) -> Tensor:
    query, key = F.linear(source, weights.to_query), F.linear(target, weights.to_key)
    value = F.linear(target, weights.to_value)
    parts: list[Tensor] = []
    for pairing in pairings:
        size, shape = pairing.windows * pairing.length, (pairing.windows, pairing.length, -1)
        own, other = slice(pairing.source, pairing.source + size), slice(pairing.target, pairing.target + size)
        parts.append(
            attention(query[own].view(shape), key[other].view(shape), value[other].view(shape), pairing.regions)
        )
    merged = F.linear(torch.cat([part.flatten(0, 1) for part in parts]), weights.merge)
    message = F.layer_norm(merged, merged.shape[1:], weights.scale, weights.shift)
    return source + message if onto_source else message


@dataclass(frozen=True)
class _Chunk:
    """Some windows of a pairing, as slices of tokens, and the slices of them that are attended in turn."""

    target: slice
    windows: int
    length: int
    regions: Tensor | None
    sources: list[tuple[slice, slice]]
    """Tokens of the source, and which rows of a window they are (all rows where there are several windows)."""


def _chunks(pairings: list[Pairing]) -> Iterator[_Chunk]:
    for pairing in pairings:
        length = pairing.length
        many, rows = chunk_size(length, length)
        for first in range(0, pairing.windows, many):
            windows = min(many, pairing.windows - first)
            start, other = pairing.source + first * length, pairing.target + first * length
            sources = []
            for row in range(0, length, rows):
                stop = min(row + rows, length)
                tokens = slice(start + row, start + (windows - 1) * length + stop)
                sources.append((tokens, slice(row, stop)))
            yield _Chunk(slice(other, other + windows * length), windows, length, pairing.regions, sources)


class _Factors(NamedTuple):
    """The layer's matrices in the type they are multiplied in, and where scores are scaled by 1 / √C."""

    to_query: Tensor
    to_key: Tensor
    to_value: Tensor
    merge: Tensor
    before: float
    """Of the queries: in 16 bits, so that scores are rounded once."""
    after: float
    """Of the scores: in full precision, which is the reference's order."""

    @classmethod
    def of(cls, to_query: Tensor, to_key: Tensor, to_value: Tensor, merge: Tensor, dtype: torch.dtype) -> _Factors:
        scale = to_query.shape[1] ** -0.5
        before, after = (1.0, scale) if dtype == to_query.dtype else (scale, 1.0)
        scaled = to_query if before == 1.0 else to_query * before
        return cls(scaled.to(dtype), to_key.to(dtype), to_value.to(dtype), merge.to(dtype), before, after)


class _Attended(NamedTuple):
    """What the queries of some windows meet.

    In 16 bits keys and values are those of the tokens less their window's mean. To a softmax, what all of a query's
    scores have in common is nothing, nor is what all of their gradients have in common: it would only be rounded.
    """

    tokens: Tensor
    """What keys are the product of."""
    key: Tensor
    value: Tensor
    mean_value: Tensor | None

    @classmethod
    def of(cls, tokens: Tensor, windows: int, factors: _Factors) -> _Attended:
        tokens = tokens.view(windows, -1, tokens.shape[1])  # [n, L, C]
        dtype = factors.merge.dtype
        if dtype == tokens.dtype:
            return cls(tokens, F.linear(tokens, factors.to_key), F.linear(tokens, factors.to_value), None)
        mean = tokens.mean(dim=1, keepdim=True)  # [n, 1, C]
        relative = (tokens - mean).to(dtype)
        mean_value = F.linear(mean.to(dtype), factors.to_value)
        return cls(relative, F.linear(relative, factors.to_key), F.linear(relative, factors.to_value), mean_value)

    def attended_with(self, weights: Tensor) -> Tensor:
        """Weights `[n, l, L]` → `[n*l, C]`."""
        found = torch.bmm(weights, self.value)
        if self.mean_value is not None:
            found += self.mean_value
        return found.flatten(0, 1)


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
    ) -> Tensor:
        ctx.save_for_backward(source, target, to_query, to_key, to_value, merge, scale, shift)
        ctx.pairings, ctx.onto_source, ctx.dtype = pairings, onto_source, dtype
        factors = _Factors.of(to_query, to_key, to_value, merge, dtype)
        out = torch.empty_like(source)
        scratch = scratch_scores(factors.merge, max(pairing.length for pairing in pairings))
        for chunk in _chunks(pairings):
            shape = (chunk.windows, -1, source.shape[1])
            attended = _Attended.of(target[chunk.target], chunk.windows, factors)
            for tokens, rows in chunk.sources:
                query = (source[tokens].to(dtype) @ factors.to_query.T).view(shape)
                weights = softmax_weights(query, attended.key, factors.after, chunk.regions, rows, scratch)
                merged = attended.attended_with(weights) @ factors.merge.T
                message = F.layer_norm(merged.to(source.dtype), scale.shape, scale, shift)
                if onto_source:
                    torch.add(source[tokens], message, out=out[tokens])
                else:
                    out[tokens] = message
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, target, *parameters = ctx.saved_tensors
        to_query, to_key, to_value, merge, scale, shift = parameters
        dtype, wide = ctx.dtype, source.dtype
        factors = _Factors.of(to_query, to_key, to_value, merge, dtype)
        for_source, for_target = torch.empty_like(source), torch.empty_like(target)
        for_query, for_key, for_value, for_merge, for_scale, for_shift = map(torch.zeros_like, parameters)
        scratch = scratch_scores(factors.merge, max(pairing.length for pairing in ctx.pairings))
        for chunk in _chunks(ctx.pairings):
            shape = (chunk.windows, -1, source.shape[1])
            part = target[chunk.target].to(dtype)
            attended = _Attended.of(target[chunk.target], chunk.windows, factors)
            upper_key, upper_value = (torch.zeros_like(attended.key, dtype=wide) for _ in range(2))
            for tokens, rows in chunk.sources:
                own = source[tokens].to(dtype)
                query = (own @ factors.to_query.T).view(shape)
                weights = softmax_weights(query, attended.key, factors.after, chunk.regions, rows, scratch)
                values = attended.attended_with(weights)
                upper_merged, more_scale, more_shift = layer_norm_backward(
                    gradient[tokens], (values @ factors.merge.T).to(wide), scale, shift
                )
                for_scale += more_scale
                for_shift += more_shift
                upper_merged = upper_merged.to(dtype)
                for_merge += upper_merged.T @ values
                upper = (upper_merged @ factors.merge).view(shape)
                upper_value += torch.bmm(weights.transpose(1, 2), upper)
                upper_weights = torch.bmm(upper, attended.value.transpose(1, 2), out=scratch(weights.shape))
                upper_scores = torch._softmax_backward_data(upper_weights, weights, -1, dtype)
                upper_key += torch.bmm(upper_scores.transpose(1, 2), query)
                upper_query = torch.bmm(upper_scores, attended.key).mul_(factors.after).flatten(0, 1)
                for_query += upper_query.T @ own
                for_source[tokens] = upper_query @ factors.to_query
                if ctx.onto_source:
                    for_source[tokens] += gradient[tokens]
            flat_key = upper_key.mul_(factors.after).flatten(0, 1).to(dtype)
            flat_value = upper_value.flatten(0, 1).to(dtype)
            for_key += flat_key.T @ attended.tokens.flatten(0, 1)
            for_value += flat_value.T @ part
            for_target[chunk.target] = flat_key @ factors.to_key
            for_target[chunk.target] += flat_value @ factors.to_value
        for_query *= factors.before
        for_parameters = (for_query, for_key, for_value, for_merge, for_scale, for_shift)
        return for_source, for_target, *for_parameters, None, None, None


_chunked_window_attention = outside_graphs(_WindowAttention.apply)
