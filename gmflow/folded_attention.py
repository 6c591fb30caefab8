"""An attention layer inside windows in float32, with its matrices multiplied beforehand: sums in any order.

There is one head without bias, so scores are x Wq' (y Wk')' and messages softmax(…) y Wv' Wm'. Of the four matrices
each two that meet become one, and keys and values are the target's tokens as they are: half of the products with
matrices on the way to the loss, and less than half on the way back, where no keys and values are computed again.

Gradients may come in 16 bits: rounding on the way to the loss turns them, rounding on the way back hardly does
(docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.attention import fused_attention
from gmflow.eager import outside_graphs
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

FUSED_LENGTH = 1 << 9
"""Tokens of a window from which on the fused operation takes less time than products (docs/performance.md)."""


def folded_window_attention(
    source: Tensor,
    target: Tensor,
    weights: AttentionWeights,
    pairings: list[Pairing],
    *,
    onto_source: bool,
    narrow: torch.dtype,
) -> Tensor:
    """`window_attention` of windows without regions in the type of `source`; the way back multiplies in `narrow`."""
    with torch.autocast(source.device.type, enabled=False):
        to_meet = weights.to_key.T @ weights.to_query * source.shape[1] ** -0.5  # scores: queries that meet tokens
        parameters = to_meet, weights.merge @ weights.to_value, weights.scale, weights.shift
        kept = narrow if torch.is_grad_enabled() else None
        out: Tensor = _in_chunks(source, target, *parameters, pairings, onto_source, kept)
    return out


class _FoldedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        target: Tensor,
        to_meet: Tensor,
        to_message: Tensor,
        scale: Tensor,
        shift: Tensor,
        pairings: list[Pairing],
        onto_source: bool,
        narrow: torch.dtype | None,
    ) -> Tensor:
        to_query, out = Matrix.of(to_meet), torch.empty_like(source)
        learns = narrow is not None
        queries, attended = (rows_of_chunks(source, source.dtype, kept=learns) for _ in range(2))
        messages, scores = Messages(Matrix.of(to_message), scale, shift, onto_source=onto_source), Scratch(source)
        for chunk in chunks(pairings):
            own, shape = source[chunk.source], (chunk.windows, -1, source.shape[1])
            query = torch.mm(own, to_query.forth, out=queries(chunk.source)).view(shape)
            other, values = target[chunk.target].view(shape), attended(chunk.source)
            if query.shape[1] >= FUSED_LENGTH:
                values.view(shape).copy_(fused_attention(query, other, other, 1.0))
            else:
                Meeting(query, other, other, 1.0).attend(chunk, scores, values.view(shape))
            messages.write(values, own, out[chunk.source])
        if learns:
            kept = (rows(slice(len(source))).to(narrow) for rows in (queries, attended))
            ctx.save_for_backward(source, target, *kept, to_meet, to_message, scale, shift)
            ctx.pairings, ctx.onto_source = pairings, onto_source
            ctx.to_itself = target is source and attend_to_themselves(pairings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, target, queries, attended, to_meet, to_message, scale, shift = ctx.saved_tensors
        to_query = Matrix.of(to_meet.to(queries.dtype))
        gradients = MessageGradients(Matrix.of(to_message.to(queries.dtype)), scale, shift)
        for_to_meet, for_queries = torch.zeros_like(to_meet), Scratch(queries)
        for_source = torch.empty_like(source)
        for_target = for_source if ctx.to_itself else torch.empty_like(target)
        for chunk in chunks(ctx.pairings):
            own, upper, shape = source[chunk.source], gradient[chunk.source], (chunk.windows, -1, source.shape[1])
            other = _centred(target[chunk.target].view(shape), queries.dtype)
            meeting = Meeting(queries[chunk.source].view(shape), other, other, 1.0)
            values, for_other = attended[chunk.source].view(shape), for_target[chunk.target].view(shape)
            for_query = for_queries.view(*own.shape)
            gradients.through_attention(
                upper.view(shape), values, meeting, chunk, for_query.view(shape), for_other, for_other
            )
            add_product(for_to_meet, for_query.T, own.to(for_query.dtype))
            for_own = for_source[chunk.source]
            (add_product if ctx.to_itself else put_product)(for_own, for_query, to_query.back)
            if ctx.onto_source:
                for_own += upper
        of_tokens = (for_source, None) if ctx.to_itself else (for_source, for_target)
        return *of_tokens, for_to_meet, gradients.merge, gradients.scale, gradients.shift, None, None, None


_in_chunks = outside_graphs(_FoldedAttention.apply)


def _centred(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Windows' tokens `[n, L, C]`, in 16 bits less their window's mean.

    To a softmax, what all of a query's scores have in common is nothing, nor is what all of their gradients have in
    common: it would only be rounded.
    """
    return tokens if dtype == tokens.dtype else (tokens - tokens.mean(dim=1, keepdim=True)).to(dtype)
