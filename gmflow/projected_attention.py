"""An attention layer inside windows in the reference's order of sums, or in 16 bits: projections, then attention.

Kept for the backward pass are the layer's inputs, which the residual stream keeps anyway, the queries and what they
attended to; keys, values and the rest are computed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.attention import fused_attention, softmax_backward, softmax_weights
from gmflow.eager import outside_graphs
from gmflow.scratch import Matrix, Scratch, add_product, put_product
from gmflow.window_chunks import Chunk, MergeGradients, Pairing, attend_to_themselves, chunks, rows_of_chunks


def projected_window_attention(
    source: Tensor,
    target: Tensor,
    to_query: Tensor,
    to_key: Tensor,
    to_value: Tensor,
    merge: Tensor,
    scale: Tensor,
    shift: Tensor,
    pairings: list[Pairing],
    *,
    onto_source: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`window_attention` with products in `dtype`; LayerNorm and residual are in that of `source`.

    In 16 bits attention is the fused operation, which takes no regions, and there are no gradients.
    """
    parameters = to_query, to_key, to_value, merge, scale, shift
    out: Tensor = _in_chunks(source, target, *parameters, pairings, onto_source, dtype, torch.is_grad_enabled())
    return out


class _Factors(NamedTuple):
    """The layer's matrices in the type they are multiplied in, and how scores come about."""

    to_query: Matrix
    to_key_and_value: Matrix
    """Of `[2C, C]`: one product gives both."""
    merge: Matrix
    scale: float
    """Of the scores: in full precision, which is the reference's order. In 16 bits it is the queries' already."""

    @classmethod
    def of(cls, to_query: Tensor, to_key: Tensor, to_value: Tensor, merge: Tensor, dtype: torch.dtype) -> _Factors:
        scale = to_query.shape[1] ** -0.5
        if dtype != to_query.dtype:
            to_query, scale = to_query * scale, 1.0
        both = torch.cat([to_key, to_value])
        return cls(Matrix.of(to_query.to(dtype)), Matrix.of(both.to(dtype)), Matrix.of(merge.to(dtype)), scale)


class _Meeting(NamedTuple):
    """The queries of some windows, and the keys and values they meet: `[n, L, C]`."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, query: Tensor, target: Tensor, windows: int, factors: _Factors, projected: Scratch) -> _Meeting:
        """Of queries and of tokens of the target, `[n*L, C]` each."""
        channels = target.shape[1]
        both = projected.view(len(target), 2 * channels)
        torch.mm(target.to(query.dtype), factors.to_key_and_value.forth, out=both)
        key, value = both.view(windows, -1, 2, channels).unbind(2)
        return cls(query.view(windows, -1, channels), key, value)

    def weights(self, rows: slice, chunk: Chunk, scale: float, scratch: Scratch) -> Tensor:
        """Of every key for these rows of the windows: `[n, l, L]`."""
        return softmax_weights(self.query[:, rows], self.key, scale, scratch, chunk.crossing, rows)


class _ProjectedAttention(torch.autograd.Function):
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
        queries, attended = (rows_of_chunks(source, dtype, kept=learns) for _ in range(2))
        projected, merged, scores = (Scratch(factors.merge.back) for _ in range(3))
        fused = dtype != source.dtype
        for chunk in chunks(pairings, fused=fused):
            own = source[chunk.source]
            query = torch.mm(own.to(dtype), factors.to_query.forth, out=queries(chunk.source))
            meeting = _Meeting.of(query, target[chunk.target], chunk.windows, factors, projected)
            if fused:
                values = fused_attention(*meeting, factors.scale)
            else:
                values = attended(chunk.source).view(meeting.query.shape)
                for rows in chunk.rows:
                    weights = meeting.weights(rows, chunk, factors.scale, scores)
                    torch.bmm(weights, meeting.value, out=values[:, rows])
            update = torch.mm(values.flatten(0, 1), factors.merge.forth, out=merged.view(*own.shape))
            message = F.layer_norm(update.to(source.dtype), scale.shape, scale, shift)
            if onto_source:
                torch.add(own, message, out=out[chunk.source])
            else:
                out[chunk.source] = message
        if learns:
            kept = (rows(slice(len(source))) for rows in (queries, attended))
            ctx.save_for_backward(source, target, *kept, to_query, to_key, to_value, merge, scale, shift)
            ctx.pairings, ctx.onto_source = pairings, onto_source
            ctx.to_itself = target is source and attend_to_themselves(pairings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, target, queries, attended, to_query, to_key, to_value, merge, scale, shift = ctx.saved_tensors
        factors = _Factors.of(to_query, to_key, to_value, merge, source.dtype)
        gradients = _Gradients(factors, scale, shift)
        for_source = torch.empty_like(source)
        for_target = for_source if ctx.to_itself else torch.empty_like(target)
        projected = Scratch(source)
        for chunk in chunks(ctx.pairings):
            own, other, upper = source[chunk.source], target[chunk.target], gradient[chunk.source]
            meeting = _Meeting.of(queries[chunk.source], other, chunk.windows, factors, projected)
            for_query, for_key, for_value = gradients.through_attention(upper, meeting, attended[chunk.source], chunk)
            gradients.of_projections(for_query, for_key, for_value, own, other)
            for_own, for_other = for_source[chunk.source], for_target[chunk.target]
            put_product(for_own, for_query, to_query)
            if ctx.onto_source:
                for_own += upper
            (add_product if ctx.to_itself else put_product)(for_other, for_key, to_key)
            add_product(for_other, for_value, to_value)
        of_tokens = (for_source, None) if ctx.to_itself else (for_source, for_target)
        return *of_tokens, *gradients.of_parameters(), None, None, None, None


_in_chunks = outside_graphs(_ProjectedAttention.apply)


class _Gradients:
    """The way back through the chunks of a layer, and the sums over them of its parameters' gradients."""

    def __init__(self, factors: _Factors, scale: Tensor, shift: Tensor) -> None:
        self._factors, self._merge = factors, MergeGradients(factors.merge, scale, shift)
        self._to_query, self._to_key, self._to_value = (torch.zeros_like(self._merge.merge) for _ in range(3))
        self._scores, self._for_scores, self._for_projected = (Scratch(scale) for _ in range(3))

    def through_attention(self, gradient: Tensor, meeting: _Meeting, attended: Tensor, chunk: Chunk) -> list[Tensor]:
        """From the gradient of the messages to those of query, key and value: `[n*L, C]` each."""
        scale, shape = self._factors.scale, meeting.query.shape
        gradient, attended = gradient.view(shape), attended.view(shape)
        for_query, for_key, for_value = self._for_projected.view(3, *shape)
        for rows in chunk.rows:
            gather = put_product if rows is chunk.rows[0] else add_product
            weights = meeting.weights(rows, chunk, scale, self._scores)
            values = attended[:, rows]
            for_values = self._merge.through(gradient[:, rows].flatten(0, 1), values.flatten(0, 1)).view(values.shape)
            for_weights = self._for_scores.view(*weights.shape)
            torch.bmm(for_values, meeting.value.transpose(1, 2), out=for_weights)
            for_scores = softmax_backward(for_weights, weights)
            torch.bmm(for_scores, meeting.key, out=for_query[:, rows])
            gather(for_key, for_scores.transpose(1, 2), meeting.query[:, rows])
            gather(for_value, weights.transpose(1, 2), for_values)
        for_query *= scale
        for_key *= scale
        return [one.flatten(0, 1) for one in (for_query, for_key, for_value)]

    def of_projections(
        self, for_query: Tensor, for_key: Tensor, for_value: Tensor, source: Tensor, target: Tensor
    ) -> None:
        """Adds what these gradients of a chunk `[n*L, C]` say of the matrices."""
        add_product(self._to_query, for_query.T, source)
        add_product(self._to_key, for_key.T, target)
        add_product(self._to_value, for_value.T, target)

    def of_parameters(self) -> tuple[Tensor, ...]:
        """The sums, in the order of `AttentionWeights`."""
        merge = self._merge
        return self._to_query, self._to_key, self._to_value, merge.merge, merge.scale, merge.shift
