"""source + LayerNorm(W2 · GELU(W1 · [source, message])) over chunks of tokens.

The hidden layer is eight times as wide as a token. A chunk of it stays in the processor's cache; as one tensor it is
what would dominate time (memory traffic) and memory. For the backward pass its values before the GELU and the updates
before the LayerNorm are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gmflow.eager import outside_graphs
from gmflow.layer_norm import layer_norm_backward
from gmflow.scratch import Scratch, add_product

CPU_CHUNK = 1 << 20
"""Hidden values computed at a time on a CPU: 4 MiB of float32, measured best (docs/performance.md)."""

ACCELERATOR_CHUNK = 1 << 27
"""Elsewhere: large enough to fill the device, small enough to bound memory at any image size."""


@outside_graphs
def feed_forward(
    source: Tensor, message: Tensor, expand: Tensor, contract: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    """Tokens `[T, C]` and messages to them `[T, C]` → updated tokens `[T, C]`.

    Args:
        source: `[T, C]`.
        message: `[T, C]`.
        expand: W1, `[H, 2C]`.
        contract: W2, `[C, H]`.
        scale: of the LayerNorm, `[C]`.
        shift: of the LayerNorm, `[C]`.
    """
    if torch.compiler.is_exporting():  # one graph for all sizes holds no loop over chunks
        update = F.linear(F.gelu(F.linear(torch.cat([source, message], dim=1), expand)), contract)
        return source + F.layer_norm(update, scale.shape, scale, shift)
    device = source.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else source.dtype
    out: Tensor = _FeedForward.apply(  # type: ignore[no-untyped-call]
        source, message.to(dtype), expand.to(dtype), contract.to(dtype), scale, shift, torch.is_grad_enabled()
    )
    return out


def _chunk_length(source: Tensor, hidden: int) -> int:
    return max(1, (CPU_CHUNK if source.device.type == "cpu" else ACCELERATOR_CHUNK) // hidden)


class _FeedForward(torch.autograd.Function):
    """Multiplies in the dtype of `message`, `expand` and `contract`; normalises in that of `scale`."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        message: Tensor,
        expand: Tensor,
        contract: Tensor,
        scale: Tensor,
        shift: Tensor,
        keep: bool,
    ) -> Tensor:
        length = _chunk_length(source, len(expand))
        out = torch.empty_like(source)
        kept = len(message) if keep else min(length, len(message))
        hidden, update = message.new_empty(kept, len(expand)), message.new_empty(kept, len(contract))
        pairs, activated = Scratch(message), Scratch(message)
        for start in range(0, len(message), length):
            chunk = slice(start, start + length)
            pair = _pair(source[chunk], message[chunk], pairs)
            place = chunk if keep else slice(len(pair))
            before = torch.mm(pair, expand.T, out=hidden[place])
            after = torch.mm(_gelu(before, activated), contract.T, out=update[place])
            torch.add(source[chunk], F.layer_norm(after.to(scale.dtype), scale.shape, scale, shift), out=out[chunk])
        if keep:
            ctx.save_for_backward(source, message, expand, contract, scale, shift, hidden, update)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, message, expand, contract, scale, shift, hidden, update = ctx.saved_tensors
        length = _chunk_length(source, len(expand))
        to_source, to_message = torch.empty_like(source), torch.empty_like(message)
        # Summed over chunks in float32 (or better), whatever the precision of the products.
        wide = torch.promote_types(expand.dtype, torch.float32)
        to_expand = torch.zeros_like(expand, dtype=wide)
        to_contract = torch.zeros_like(contract, dtype=wide)
        to_scale, to_shift = torch.zeros_like(scale), torch.zeros_like(shift)
        pairs, activated, upper_hidden = (Scratch(message) for _ in range(3))
        for start in range(0, len(message), length):
            chunk = slice(start, start + length)
            pair = _pair(source[chunk], message[chunk], pairs)
            before = hidden[chunk]
            to_update, more_scale, more_shift = layer_norm_backward(
                gradient[chunk], update[chunk].to(scale.dtype), scale, shift
            )
            to_scale += more_scale
            to_shift += more_shift
            upper = to_update.to(message.dtype)
            add_product(to_contract, upper.T, _gelu(before, activated))
            to_hidden = torch.mm(upper, contract, out=upper_hidden.view(*before.shape))
            torch.ops.aten.gelu_backward.grad_input(to_hidden, before, grad_input=to_hidden)
            add_product(to_expand, to_hidden.T, pair)
            to_pair = to_hidden @ expand
            own, to_message[chunk] = to_pair.chunk(2, dim=1)
            torch.add(gradient[chunk], own, out=to_source[chunk])
        for_matrices = to_expand.to(expand.dtype), to_contract.to(contract.dtype)
        return to_source, to_message, *for_matrices, to_scale, to_shift, None


def _pair(source: Tensor, message: Tensor, scratch: Scratch) -> Tensor:
    """`[n, C]` each → `[n, 2C]`, in the type of the message."""
    pair = scratch.view(len(source), 2 * source.shape[1])
    return torch.cat([source.to(message.dtype), message], dim=1, out=pair)


def _gelu(before: Tensor, scratch: Scratch) -> Tensor:
    activated: Tensor = torch.ops.aten.gelu.out(before, out=scratch.view(*before.shape))
    return activated
