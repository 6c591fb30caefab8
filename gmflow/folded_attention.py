"""An attention layer inside windows with its matrices multiplied beforehand: sums in another order.

There is one head without bias, so scores are x Wq' (y Wk')' and messages softmax(…) y Wv'Wm'. Each two matrices that
meet are multiplied beforehand, which leaves two of four, and keys and values are the target's tokens as they are. That
is half of the products with matrices in the forward pass, and less than half in the backward pass, which need not
compute keys and values again.

The backward pass may be in fewer bits than the forward pass: rounding in the forward pass changes the direction of the
gradients, rounding in the backward pass hardly does (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.attention import fused_attention, runs_eagerly_on_cpu
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

FUSED_LENGTH = 1 << 9
"""From this many tokens in a window on, PyTorch's fused attention is faster on a CPU (docs/performance.md)."""


def folded_window_attention(
    source: Tensor,
    target: Tensor,
    weights: AttentionWeights,
    pairings: list[Pairing],
    *,
    onto_source: bool,
    forth: torch.dtype,
    back: torch.dtype,
) -> Tensor:
    """`window_attention` of windows without regions.

    Products are in the type `forth` in the forward pass and `back` in the backward pass; LayerNorm and residual are in
    that of `source`.
    """
    with torch.autocast(source.device.type, enabled=False):
        to_meet = weights.to_key.T @ weights.to_query * source.shape[1] ** -0.5  # scores are (x to_meet') y'
        parameters = to_meet, weights.merge @ weights.to_value, weights.scale, weights.shift
        types = forth, back if torch.is_grad_enabled() else None
        out: Tensor = _in_chunks(source, target, *parameters, pairings, onto_source, *types)
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
        forth: torch.dtype,
        back: torch.dtype | None,
    ) -> Tensor:
        to_query, out, with_gradients = Matrix.of(to_meet.to(forth)), torch.empty_like(source), back is not None
        attending = source.to(forth)
        others = attending if target is source else target.to(forth)
        queries, attended = (rows_of_chunks(source, forth, kept=with_gradients) for _ in range(2))
        messages = Messages(Matrix.of(to_message.to(forth)), scale, shift, onto_source=onto_source)
        scores, eagerly_on_cpu = Scratch(attending), runs_eagerly_on_cpu(source.device)
        for chunk in chunks(pairings, source.device, fused=not eagerly_on_cpu):
            query = torch.mm(attending[chunk.tokens], to_query.forth, out=queries(chunk.tokens))
            values = attended(chunk.tokens)
            for windows in chunk.windows:
                own, shape = chunk.place(windows), (windows.number, -1, source.shape[1])
                other = others[windows.target].view(shape)
                meeting = Meeting(query[own].view(shape), other, other, 1.0)
                if not eagerly_on_cpu or meeting.query.shape[1] >= FUSED_LENGTH:
                    values[own].view(shape).copy_(fused_attention(*meeting))
                else:
                    meeting.attend(windows, scores, values[own].view(shape))
            messages.write(values, source[chunk.tokens], out[chunk.tokens])
        if back is not None:
            everything = slice(len(source))
            rows = (queries(everything), attended(everything))
            kept = (one if one.itemsize <= back.itemsize else one.to(back) for one in rows)
            ctx.save_for_backward(source, target, to_meet, to_message, scale, shift, *kept, *messages.statistics)
            ctx.chunks, ctx.onto_source, ctx.back = list(chunks(pairings, source.device)), onto_source, back
            ctx.to_itself = target is source and attend_to_themselves(pairings)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, target, to_meet, to_message, scale, shift, *kept = ctx.saved_tensors
        queries, attended, *statistics = kept
        queries, attended = queries.to(ctx.back), attended.to(ctx.back)
        to_query = Matrix.of(to_meet.to(ctx.back))
        gradients = MessageGradients(Matrix.of(to_message.to(ctx.back)), scale, shift, Statistics(*statistics))
        for_to_meet, for_queries, others = torch.zeros_like(to_meet), Scratch(queries), _centred(target, ctx.back)
        for_source = torch.empty_like(source)
        for_target = for_source if ctx.to_itself else torch.empty_like(target)
        for chunk in ctx.chunks:
            for_messages = gradient[chunk.tokens]
            for_attended = gradients.of_attended(for_messages, attended[chunk.tokens], chunk.tokens)
            for_query = for_queries.view(*for_messages.shape)
            for windows in chunk.windows:
                own, shape = chunk.place(windows), (windows.number, -1, source.shape[1])
                other, for_other = others[windows.target].view(shape), for_target[windows.target].view(shape)
                meeting = Meeting(queries[windows.source].view(shape), other, other, 1.0)
                upper, for_own = for_attended[own].view(shape), for_query[own].view(shape)
                gradients.through_attention(upper, meeting, windows, for_own, for_other, for_other)
            add_product(for_to_meet, for_query.T, source[chunk.tokens].to(ctx.back))
            for_tokens = for_source[chunk.tokens]
            (add_product if ctx.to_itself else put_product)(for_tokens, for_query, to_query.back)
            if ctx.onto_source:
                for_tokens += for_messages
        of_tokens = (for_source, None) if ctx.to_itself else (for_source, for_target)
        return *of_tokens, for_to_meet, gradients.merge, gradients.scale, gradients.shift, None, None, None, None


_in_chunks = outside_graphs(_FoldedAttention.apply)


def _centred(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens `[T, C]` in `dtype`, in 16 bits less their mean.

    Adding the same number to all scores of a query does not change their softmax, so the tokens' mean can be
    subtracted; left in, it would only cost bits.
    """
    if dtype == tokens.dtype:
        return tokens
    return torch.sub(tokens, tokens.mean(dim=0), out=torch.empty_like(tokens, dtype=dtype))
