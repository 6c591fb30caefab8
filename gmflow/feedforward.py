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
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else source.dtype
    # What a step learns from is where it stands: rounding on the way there turns gradients, rounding on the way back
    # hardly does (docs/performance.md).
    dtype = source.dtype if torch.is_grad_enabled() else narrow
    out: Tensor = _FeedForward.apply(  # type: ignore[no-untyped-call]
        source, message.to(dtype), expand, contract, scale, shift, narrow if torch.is_grad_enabled() else None
    )
    return out


def _chunk_length(source: Tensor, hidden: int) -> int:
    return max(1, (CPU_CHUNK if source.device.type == "cpu" else ACCELERATOR_CHUNK) // hidden)


class _FeedForward(torch.autograd.Function):
    """Multiplies in the type of `message`, on the way back in `narrow`; sums and normalises in that of `source`."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        message: Tensor,
        expand: Tensor,
        contract: Tensor,
        scale: Tensor,
        shift: Tensor,
        narrow: torch.dtype | None,
    ) -> Tensor:
        length = _chunk_length(source, len(expand))
        out = torch.empty_like(source)
        whole, one_chunk = len(message), min(length, len(message))
        rounds = narrow not in (None, message.dtype)
        rounded = message.new_empty(whole, len(expand), dtype=narrow) if rounds else None  # of what is before the GELU
        hidden = message.new_empty(one_chunk if narrow is None or rounds else whole, len(expand))
        update = message.new_empty(one_chunk if narrow is None else whole, len(contract))
        factors = expand.T.to(message.dtype), contract.T.to(message.dtype)
        pairs, activated = Scratch(message), Scratch(message)
        for start in range(0, len(message), length):
            chunk = slice(start, start + length)
            pair = _pair(source[chunk], message[chunk], pairs)
            before = torch.mm(pair, factors[0], out=_place(hidden, chunk, len(pair)))
            if rounded is not None:
                rounded[chunk] = before
            after = torch.mm(_gelu(before, activated), factors[1], out=_place(update, chunk, len(pair)))
            torch.add(source[chunk], F.layer_norm(after.to(scale.dtype), scale.shape, scale, shift), out=out[chunk])
        if narrow is not None:
            ctx.narrow = narrow
            before_gelu = hidden if rounded is None else rounded
            ctx.save_for_backward(source, message, expand, contract, scale, shift, before_gelu, update)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, message, expand, contract, scale, shift, hidden, update = ctx.saved_tensors
        length, dtype = _chunk_length(source, len(expand)), ctx.narrow
        to_source, to_message = torch.empty_like(source), torch.empty_like(message)
        to_expand, to_contract, to_scale, to_shift = map(torch.zeros_like, (expand, contract, scale, shift))
        factors = expand.to(dtype), contract.to(dtype)
        pairs, activated, upper_hidden = (Scratch(hidden) for _ in range(3))
        for start in range(0, len(message), length):
            chunk = slice(start, start + length)
            pair = _pair(source[chunk], message[chunk], pairs)
            before = hidden[chunk]
            to_update, more_scale, more_shift = layer_norm_backward(gradient[chunk], update[chunk], scale, shift)
            to_scale += more_scale
            to_shift += more_shift
            upper = to_update.to(dtype)
            add_product(to_contract, upper.T, _gelu(before, activated))
            to_hidden = torch.mm(upper, factors[1], out=upper_hidden.view(*before.shape))
            torch.ops.aten.gelu_backward.grad_input(to_hidden, before, grad_input=to_hidden)
            add_product(to_expand, to_hidden.T, pair)
            own, to_message[chunk] = (to_hidden @ factors[0]).chunk(2, dim=1)
            torch.add(gradient[chunk], own, out=to_source[chunk])
        return to_source, to_message, to_expand, to_contract, to_scale, to_shift, None


def _place(memory: Tensor, chunk: slice, length: int) -> Tensor:
    """A chunk's own rows of memory for all tokens, or the first ones of memory for a single chunk."""
    own = memory[chunk]
    return own if len(own) == length else memory[:length]


def _pair(source: Tensor, message: Tensor, scratch: Scratch) -> Tensor:
    """`[n, C]` each → `[n, 2C]`, in the type of the scratch."""
    pair = scratch.view(len(source), 2 * source.shape[1])
    return torch.cat([source.to(pair.dtype), message.to(pair.dtype)], dim=1, out=pair)


def _gelu(before: Tensor, scratch: Scratch) -> Tensor:
    activated: Tensor = torch.ops.aten.gelu.out(before, out=scratch.view(*before.shape))
    return activated
