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
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.attention import fused_attention, softmax_backward, softmax_weights
from gmflow.eager import outside_graphs
from gmflow.scratch import Matrix, Scratch, add_product, put_product
from gmflow.window_chunks import MergeGradients, Pairing, attend_to_themselves, chunks, rows_of_chunks

FUSED_LENGTH = 1 << 9
"""Tokens of a window from which on the fused operation takes less time than products (docs/performance.md)."""


def folded_window_attention(
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
    narrow: torch.dtype,
) -> Tensor:
    """`window_attention` of windows without regions in the type of `source`; the way back multiplies in `narrow`."""
    with torch.autocast(source.device.type, enabled=False):
        to_meet = to_key.T @ to_query * source.shape[1] ** -0.5  # scores are of queries that meet tokens
        to_message = merge @ to_value
        kept = narrow if torch.is_grad_enabled() else None
        out: Tensor = _in_chunks(source, target, to_meet, to_message, scale, shift, pairings, onto_source, kept)
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
        to_query, merge = Matrix.of(to_meet), Matrix.of(to_message)
        out = torch.empty_like(source)
        learns = narrow is not None
        queries, attended = (rows_of_chunks(source, source.dtype, kept=learns) for _ in range(2))
        scores, merged = Scratch(source), Scratch(source)
        for chunk in chunks(pairings):
            own, shape = source[chunk.source], (chunk.windows, -1, source.shape[1])
            query = torch.mm(own, to_query.forth, out=queries(chunk.source)).view(shape)
            other, values = target[chunk.target].view(shape), attended(chunk.source)
            if query.shape[1] >= FUSED_LENGTH:
                values.view(shape).copy_(fused_attention(query, other, other, 1.0))
            else:
                for rows in chunk.rows:
                    weights = softmax_weights(query[:, rows], other, 1.0, scores)
                    torch.bmm(weights, other, out=values.view(shape)[:, rows])
            update = torch.mm(values, merge.forth, out=merged.view(*own.shape))
            message = F.layer_norm(update, scale.shape, scale, shift)
            if onto_source:
                torch.add(own, message, out=out[chunk.source])
            else:
                out[chunk.source] = message
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
        gradients = _Gradients(Matrix.of(to_message.to(queries.dtype)), scale, shift)
        for_source = torch.empty_like(source)
        for_target = for_source if ctx.to_itself else torch.empty_like(target)
        for chunk in chunks(ctx.pairings):
            own, upper, shape = source[chunk.source], gradient[chunk.source], (chunk.windows, -1, source.shape[1])
            query, values = queries[chunk.source].view(shape), attended[chunk.source].view(shape)
            other = _centred(target[chunk.target].view(shape), query.dtype)
            for_other = for_target[chunk.target].view(shape)
            for_query = gradients.through_attention(upper.view(shape), query, other, values, chunk.rows, for_other)
            gradients.of_queries(for_query, own)
            for_own = for_source[chunk.source]
            (add_product if ctx.to_itself else put_product)(for_own, for_query, to_query.back)
            if ctx.onto_source:
                for_own += upper
        of_tokens = (for_source, None) if ctx.to_itself else (for_source, for_target)
        return *of_tokens, *gradients.of_parameters(), None, None, None


_in_chunks = outside_graphs(_FoldedAttention.apply)


def _centred(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Windows' tokens `[n, L, C]`, in 16 bits less their window's mean.

    To a softmax, what all of a query's scores have in common is nothing, nor is what all of their gradients have in
    common: it would only be rounded.
    """
    return tokens if dtype == tokens.dtype else (tokens - tokens.mean(dim=1, keepdim=True)).to(dtype)


class _Gradients:
    """The way back through the chunks of a layer, and the sums over them of its parameters' gradients."""

    def __init__(self, merge: Matrix, scale: Tensor, shift: Tensor) -> None:
        self._merge = MergeGradients(merge, scale, shift)
        self._to_meet = torch.zeros_like(self._merge.merge)
        self._scores, self._for_scores, self._for_query = (Scratch(merge.back) for _ in range(3))

    def through_attention(
        self, gradient: Tensor, query: Tensor, other: Tensor, attended: Tensor, rows: list[slice], for_other: Tensor
    ) -> Tensor:
        """From the gradient of the messages of some windows to that of their queries, `[n*L, C]`.

        All else is `[n, L, C]`. What concerns the tokens attended to, as keys and as values, goes to `for_other`.
        """
        for_query = self._for_query.view(*query.shape)
        for part in rows:
            weights = softmax_weights(query[:, part], other, 1.0, self._scores)
            values = attended[:, part]
            for_values = self._merge.through(gradient[:, part].flatten(0, 1), values.flatten(0, 1)).view(values.shape)
            for_weights = self._for_scores.view(*weights.shape)
            torch.bmm(for_values, other.transpose(1, 2), out=for_weights)
            for_scores = softmax_backward(for_weights, weights)
            torch.bmm(for_scores, other, out=for_query[:, part])
            gather = put_product if part is rows[0] else add_product
            gather(for_other, for_scores.transpose(1, 2), query[:, part])
            add_product(for_other, weights.transpose(1, 2), for_values)
        return for_query.flatten(0, 1)

    def of_queries(self, for_query: Tensor, source: Tensor) -> None:
        """Adds what the gradient of a chunk's queries says of their matrix: `[n*L, C]` each."""
        add_product(self._to_meet, for_query.T, source.to(for_query.dtype))

    def of_parameters(self) -> tuple[Tensor, ...]:
        """The sums: of both matrices, the LayerNorm's scale and its shift."""
        return self._to_meet, self._merge.merge, self._merge.scale, self._merge.shift
