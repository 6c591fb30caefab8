"""A whole attention layer inside windows: query, key and value projections, attention, merge, LayerNorm, residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gmflow.attention import CROSSING_PENALTY, attention, fused_attention, runs_eagerly_on_cpu
from gmflow.folded_attention import folded_window_attention
from gmflow.projected_attention import projected_window_attention
from gmflow.window_chunks import AttentionWeights, Pairing

ACCELERATOR_DTYPE = torch.float16
"""Type of attention on accelerators where sums may be in any order: float16.

It rounds to 10 bits, as TF32 does, at half the bytes. Its narrower range suffices for sums of normalised messages.
bfloat16 would round more; fused attention in float32 would make a pass half as long again (docs/performance.md).
"""


def window_attention(
    source: Tensor,
    target: Tensor,
    weights: AttentionWeights,
    pairings: list[Pairing],
    *,
    onto_source: bool,
    any_order: bool,
) -> Tensor:
    """LayerNorm(merge · softmax(query · key / √C) · value) within windows.

    Args:
        source: tokens that attend, `[T, C]` in window order; queries are computed from them.
        target: tokens that are attended to, `[T, C]` in window order; keys and values are computed from them.
        weights: the layer's parameters.
        pairings: every window once as a source, in order, and once as a target.
        onto_source: add the result to the source.
        any_order: sums may be in another order than the reference's. In 16 bits they always may.

    Returns:
        `[T, C]`.
    """
    device, wide = source.device, source.dtype
    narrow = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else wide
    any_order, eagerly_on_cpu = any_order or narrow != wide, runs_eagerly_on_cpu(device)
    if torch.compiler.is_exporting() or not (eagerly_on_cpu or any_order):
        return _step_by_step(source, target, weights, pairings, onto_source)
    if eagerly_on_cpu and (not any_order or (narrow != wide and not torch.is_grad_enabled())):
        return projected_window_attention(source, target, weights, pairings, onto_source=onto_source, dtype=narrow)
    # The forward pass is in more bits than the backward pass (docs/performance.md).
    forth = wide if eagerly_on_cpu else ACCELERATOR_DTYPE
    return folded_window_attention(source, target, weights, pairings, onto_source=onto_source, forth=forth, back=narrow)


def _step_by_step(
    source: Tensor, target: Tensor, weights: AttentionWeights, pairings: list[Pairing], onto_source: bool
) -> Tensor:
    """In the reference's order: for float32 on accelerators, and for an exported program, whose windows have regions.

    The backward pass of attention goes chunk by chunk (see `attention`).
    """
    query, key, value = _projected(source, target, weights)
    # Split, not sliced one by one: the gradient of each slice would be a zeroed tensor of the whole size.
    sizes = [pairing.windows * pairing.length for pairing in pairings]
    queries, keys, values = (torch.split(one, sizes) for one in (query, key, value))
    parts: list[Tensor] = []
    for pairing, own in zip(pairings, queries, strict=True):
        shape = (pairing.windows, pairing.length, source.shape[1])
        other = keys[pairing.partner].view(shape), values[pairing.partner].view(shape)
        if pairing.regions is None:
            attended = attention(own.view(shape), *other)
        else:
            attended = _attended_within(pairing.regions, own.view(shape), *other)
        parts.append(attended.flatten(0, 1))
    merged = F.linear(torch.cat(parts), weights.merge)
    message = F.layer_norm(merged, merged.shape[1:], weights.scale, weights.shift)
    return source + message if onto_source else message


def _attended_within(regions: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention within the regions of windows, without a mask, which would be as large as all scores.

    Four more channels of queries and keys mark the regions: they add `-CROSSING_PENALTY` to the scores of pairs of the
    same region. The reference subtracts as much from the others, which gives the same softmax.
    """
    scale = query.shape[-1] ** -0.5
    mark = F.one_hot(regions, 4).to(query.dtype) * (-CROSSING_PENALTY / scale) ** 0.5  # [n, L, 4]
    marks = mark.repeat(query.shape[0] // len(regions), 1, 1)  # [N, L, 4]
    return fused_attention(torch.cat([query, marks], dim=2), torch.cat([key, marks], dim=2), value, scale)


def _projected(source: Tensor, target: Tensor, weights: AttentionWeights) -> tuple[Tensor, ...]:
    """Queries, keys and values `[T, C]`: one product where all come from the same tokens, otherwise two."""
    if target is source:
        matrices = torch.cat([weights.to_query, weights.to_key, weights.to_value])  # [3C, C]
        return F.linear(source, matrices).chunk(3, dim=1)
    key, value = F.linear(target, torch.cat([weights.to_key, weights.to_value])).chunk(2, dim=1)
    return F.linear(source, weights.to_query), key, value
