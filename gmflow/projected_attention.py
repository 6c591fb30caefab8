"""An attention layer inside windows on a CPU, in the reference's order of sums or in 16 bits.

For the backward pass are kept the layer's inputs, which the residual stream keeps anyway, the queries and the attended
values. Keys, values and softmax weights are computed again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.attention import fused_attention
from gmflow.eager import outside_graphs
from gmflow.layer_norm import Statistics
from gmflow.scratch import Matrix, Scratch, add_product, put_product
from gmflow.window_chunks import (
    AttentionWeights,
    Meeting,
    MessageGradients,
    Messages,
    Pairing,
    attend_to_themselves,
    chunks,
    rows_of_chunks,
)


def projected_window_attention(
    source: Tensor,
    target: Tensor,
    weights: AttentionWeights,
    pairings: list[Pairing],
    *,
    onto_source: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`window_attention` with products in `dtype`; LayerNorm and residual are in that of `source`.

    In 16 bits attention is PyTorch's fused operation, so windows must have no regions, and there is no backward pass.
    """
    out: Tensor = _in_chunks(source, target, *weights, pairings, onto_source, dtype, torch.is_grad_enabled())
    return out


class _Factors(NamedTuple):
    """The layer's matrices, in the type of products, and the factor of the scores."""

    to_query: Matrix
    to_key_and_value: Matrix
    """Both matrices on top of each other, `[2C, C]`: one product gives keys and values."""
    merge: Matrix
    scale: float
    """Factor of the scores. In 16 bits it is multiplied into `to_query` beforehand and is 1 here."""

    @classmethod
    def of(cls, to_query: Tensor, to_key: Tensor, to_value: Tensor, merge: Tensor, dtype: torch.dtype) -> _Factors:
        scale = to_query.shape[1] ** -0.5
        if dtype != to_query.dtype:
            to_query, scale = to_query * scale, 1.0
        both = torch.cat([to_key, to_value])
        return cls(Matrix.of(to_query.to(dtype)), Matrix.of(both.to(dtype)), Matrix.of(merge.to(dtype)), scale)

    def meeting(self, query: Tensor, target: Tensor, windows: int, projected: Scratch) -> Meeting:
        """Queries, and keys and values computed from the tokens that are attended to: `[n*L, C]` each."""
        channels = target.shape[1]
        both = projected.view(len(target), 2 * channels)
        torch.mm(target.to(query.dtype), self.to_key_and_value.forth, out=both)
        key, value = both.view(windows, -1, 2, channels).unbind(2)
        return Meeting(query.view(windows, -1, channels), key, value, self.scale)


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
        with_gradients: bool,
    ) -> Tensor:
        factors = _Factors.of(to_query, to_key, to_value, merge, dtype)
        out = torch.empty_like(source)
        queries, attended = (rows_of_chunks(source, dtype, kept=with_gradients) for _ in range(2))
        messages = Messages(factors.merge, scale, shift, onto_source=onto_source)
        projected, scores = (Scratch(factors.merge.back) for _ in range(2))
        fused = dtype != source.dtype
        parts = list(chunks(pairings, source.device, fused=fused))
        for chunk in parts:
            (windows,) = chunk.windows
            own = source[chunk.tokens]
            query = torch.mm(own.to(dtype), factors.to_query.forth, out=queries(chunk.tokens))
            meeting = factors.meeting(query, target[windows.target], windows.number, projected)
            if fused:
                values = fused_attention(*meeting).flatten(0, 1)
            else:
                values = attended(chunk.tokens)
                meeting.attend(windows, scores, values.view(meeting.query.shape))
            messages.write(values, own, out[chunk.tokens])
        if with_gradients:
            kept = *(rows(slice(len(source))) for rows in (queries, attended)), *messages.statistics
            ctx.save_for_backward(source, target, to_query, to_key, to_value, merge, scale, shift, *kept)
            ctx.chunks, ctx.onto_source = parts, onto_source
            ctx.to_itself = target is source and attend_to_themselves(pairings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, target, to_query, to_key, to_value, merge, scale, shift, *kept = ctx.saved_tensors
        queries, attended, *statistics = kept
        factors = _Factors.of(to_query, to_key, to_value, merge, source.dtype)
        gradients = MessageGradients(factors.merge, scale, shift, Statistics(*statistics))
        for_to_query, for_to_key, for_to_value = (torch.zeros_like(to_query) for _ in range(3))
        for_source = torch.empty_like(source)
        for_target = for_source if ctx.to_itself else torch.empty_like(target)
        projected, for_projected = Scratch(source), Scratch(source)
        for chunk in ctx.chunks:
            (windows,) = chunk.windows
            own, other, upper = source[chunk.tokens], target[windows.target], gradient[chunk.tokens]
            meeting = factors.meeting(queries[chunk.tokens], other, windows.number, projected)
            shape = meeting.query.shape
            for_attended = gradients.of_attended(upper, attended[chunk.tokens], chunk.tokens).view(shape)
            of_projections = for_projected.view(3, *shape)
            gradients.through_attention(for_attended, meeting, windows, *of_projections)
            of_projections[:2] *= factors.scale  # queries and keys make scores, which are scaled
            for_query, for_key, for_value = of_projections.flatten(1, 2)
            add_product(for_to_query, for_query.T, own)
            add_product(for_to_key, for_key.T, other)
            add_product(for_to_value, for_value.T, other)
            for_own, for_other = for_source[chunk.tokens], for_target[windows.target]
            put_product(for_own, for_query, to_query)
            if ctx.onto_source:
                for_own += upper
            (add_product if ctx.to_itself else put_product)(for_other, for_key, to_key)
            add_product(for_other, for_value, to_value)
        of_tokens = (for_source, None) if ctx.to_itself else (for_source, for_target)
        of_matrices = for_to_query, for_to_key, for_to_value, gradients.merge
        return *of_tokens, *of_matrices, gradients.scale, gradients.shift, None, None, None, None


_in_chunks = outside_graphs(_ProjectedAttention.apply)
