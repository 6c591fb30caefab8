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

from gmflow.attention import attention, chunk_size, computes_exactly, scratch_scores, softmax_weights
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
    if computes_exactly(source):
        out: Tensor = _chunked_window_attention(source, target, *weights, pairings, onto_source)
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


class _WindowAttention(torch.autograd.Function):
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
    ) -> Tensor:
        ctx.save_for_backward(source, target, to_query, to_key, to_value, merge, scale, shift)
        ctx.pairings, ctx.onto_source = pairings, onto_source
        out = torch.empty_like(source)
        scratch = scratch_scores(source, max(pairing.length for pairing in pairings))
        for chunk in _chunks(pairings):
            shape = (chunk.windows, -1, source.shape[1])
            key = (target[chunk.target] @ to_key.T).view(shape)
            value = (target[chunk.target] @ to_value.T).view(shape)
            for tokens, rows in chunk.sources:
                query = (source[tokens] @ to_query.T).view(shape)
                weights = softmax_weights(query, key, chunk.regions, rows, scratch)
                merged = torch.bmm(weights, value).flatten(0, 1) @ merge.T
                message = F.layer_norm(merged, scale.shape, scale, shift)
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
        for_source, for_target = torch.empty_like(source), torch.empty_like(target)
        for_query, for_key, for_value, for_merge, for_scale, for_shift = map(torch.zeros_like, parameters)
        scratch = scratch_scores(source, max(pairing.length for pairing in ctx.pairings))
        scaling = source.shape[1] ** -0.5
        for chunk in _chunks(ctx.pairings):
            shape = (chunk.windows, -1, source.shape[1])
            part = target[chunk.target]
            key, value = (part @ to_key.T).view(shape), (part @ to_value.T).view(shape)
            upper_key, upper_value = torch.zeros_like(key), torch.zeros_like(value)
            for tokens, rows in chunk.sources:
                query = (source[tokens] @ to_query.T).view(shape)
                weights = softmax_weights(query, key, chunk.regions, rows, scratch)
                attended = torch.bmm(weights, value).flatten(0, 1)
                upper_merged, more_scale, more_shift = layer_norm_backward(
                    gradient[tokens], attended @ merge.T, scale, shift
                )
                for_scale += more_scale
                for_shift += more_shift
                for_merge.addmm_(upper_merged.T, attended)
                upper = (upper_merged @ merge).view(shape)
                upper_value.baddbmm_(weights.transpose(1, 2), upper)
                upper_weights = torch.bmm(upper, value.transpose(1, 2), out=scratch(weights.shape))
                upper_scores = torch._softmax_backward_data(upper_weights, weights, -1, weights.dtype)
                upper_query = torch.bmm(upper_scores, key).mul_(scaling).flatten(0, 1)
                upper_key.baddbmm_(upper_scores.transpose(1, 2), query, alpha=scaling)
                for_query.addmm_(upper_query.T, source[tokens])
                torch.mm(upper_query, to_query, out=for_source[tokens])
                if ctx.onto_source:
                    for_source[tokens] += gradient[tokens]
            flat_key, flat_value = upper_key.flatten(0, 1), upper_value.flatten(0, 1)
            for_key.addmm_(flat_key.T, part)
            for_value.addmm_(flat_value.T, part)
            torch.mm(flat_key, to_key, out=for_target[chunk.target]).addmm_(flat_value, to_value)
        for_parameters = (for_query, for_key, for_value, for_merge, for_scale, for_shift)
        return for_source, for_target, *for_parameters, None, None


_chunked_window_attention = outside_graphs(_WindowAttention.apply)
