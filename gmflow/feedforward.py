"""source + LayerNorm(W2 · GELU(W1 · [source, message])) over chunks of tokens.

The hidden layer is eight times as wide as a token. A chunk of it stays in the processor's cache. As one tensor it would
take most of the time (memory traffic) and most of the memory. For the backward pass are kept the hidden values before
the GELU, the updates before the LayerNorm, and the LayerNorm's statistics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

from gmflow.eager import outside_graphs
from gmflow.layer_norm import Statistics, layer_norm, layer_norm_backward
from gmflow.scratch import Matrix, Scratch, add_product

CPU_CHUNK = 1 << 21
"""Hidden values that a CPU computes at a time: 8 MiB of float32, measured best (docs/performance.md)."""

ACCELERATOR_CHUNK = 1 << 27
"""Hidden values that an accelerator computes at a time: enough to keep it busy, in bounded memory at any image size."""


@outside_graphs
def feed_forward(
    source: Tensor,
    message: Tensor,
    expand: Tensor,
    contract: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    any_order: bool = False,
) -> Tensor:
    """Tokens `[T, C]` and messages to them `[T, C]` → updated tokens `[T, C]`.

    Args:
        source: `[T, C]`.
        message: `[T, C]`.
        expand: W1, `[H, 2C]`.
        contract: W2, `[C, H]`.
        scale: scale of the LayerNorm, `[C]`.
        shift: shift of the LayerNorm, `[C]`.
        any_order: sums of the forward pass may be in another order than the reference's. Those of the backward pass are
            in whatever order is the fastest.
    """
    if torch.compiler.is_exporting():  # one graph for all sizes cannot hold a loop over chunks
        update = F.linear(F.gelu(F.linear(torch.cat([source, message], dim=1), expand)), contract)
        return source + F.layer_norm(update, scale.shape, scale, shift)
    device = source.device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else source.dtype
    # Rounding in the forward pass changes the direction of the gradients; rounding in the backward pass hardly does
    # (docs/performance.md). So in training only the backward pass is in 16 bits.
    dtype = source.dtype if torch.is_grad_enabled() else narrow
    back = narrow if torch.is_grad_enabled() else None
    out: Tensor = _FeedForward.apply(source, message.to(dtype), expand, contract, scale, shift, back, any_order)  # type: ignore[no-untyped-call]
    return out


def _chunks(source: Tensor, hidden: int) -> list[slice]:
    length = max(1, (CPU_CHUNK if source.is_cpu else ACCELERATOR_CHUNK) // hidden)
    return [slice(start, min(start + length, len(source))) for start in range(0, len(source), length)]


class _FeedForward(torch.autograd.Function):
    """The forward pass multiplies in the type of `message`, the backward pass in `back`.

    Both normalise and add to `source` in the type of `source`. Where `back` is None there is no backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        message: Tensor,
        expand: Tensor,
        contract: Tensor,
        scale: Tensor,
        shift: Tensor,
        back: torch.dtype | None,
        any_order: bool,
    ) -> Tensor:
        dtype = message.dtype
        out = torch.empty_like(source)
        factors = Matrix.of(expand.to(dtype)), Matrix.of(contract.to(dtype))
        pairs, hidden, activated, update = (Scratch(message) for _ in range(4))
        kept: list[Tensor] = []
        for chunk in _chunks(source, len(expand)):
            pair = _pair(source[chunk], message[chunk], pairs)
            # The next chunk overwrites scratch memory, so what is kept for the backward pass must have its own: the
            # updates, and the hidden values unless they are converted to another type, which copies them.
            before = _times(pair, factors[0], None if back == dtype else hidden, any_order)
            after = _times(_gelu(before, activated), factors[1], None if back is not None else update, any_order)
            normalised, statistics = layer_norm(after.to(scale.dtype), scale, shift)
            torch.add(source[chunk], normalised, out=out[chunk])
            if back is not None:
                kept += before.to(back), after, *statistics
        if back is not None:
            ctx.back = back
            ctx.save_for_backward(source, message, expand, contract, scale, shift, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, message, expand, contract, scale, shift, *kept = ctx.saved_tensors
        chunks, dtype = _chunks(source, len(expand)), ctx.back
        of_chunks = zip(kept[::4], kept[1::4], map(Statistics, kept[2::4], kept[3::4]), strict=True)
        to_source, to_message = torch.empty_like(source), torch.empty_like(message)
        to_expand, to_contract, to_scale, to_shift = map(torch.zeros_like, (expand, contract, scale, shift))
        factors = Matrix.of(expand.to(dtype)).reversed, Matrix.of(contract.to(dtype)).reversed
        pairs, activated, upper_hidden, to_pairs = (Scratch(kept[0]) for _ in range(4))
        for chunk, (before, update, statistics) in zip(chunks, of_chunks, strict=True):
            pair = _pair(source[chunk], message[chunk], pairs)
            to_update, more_scale, more_shift = layer_norm_backward(gradient[chunk], update, statistics, scale, shift)
            to_scale += more_scale
            to_shift += more_shift
            upper = to_update.to(dtype)
            _add_gradient(to_contract, upper, _gelu(before, activated))
            to_hidden = _times(upper, factors[1], upper_hidden, any_order=True)
            torch.ops.aten.gelu_backward.grad_input(to_hidden, before, grad_input=to_hidden)
            _add_gradient(to_expand, to_hidden, pair)
            own, to_message[chunk] = _times(to_hidden, factors[0], to_pairs, any_order=True).chunk(2, dim=1)
            torch.add(gradient[chunk], own, out=to_source[chunk])
        return to_source, to_message, to_expand, to_contract, to_scale, to_shift, None, None


def _times(tokens: Tensor, matrix: Matrix, scratch: Scratch | None, any_order: bool) -> Tensor:
    """`[n, K]` times `matrix.forth` `[K, M]` → `[n, M]`, in `scratch` or, where that is None, in fresh memory.

    In float32 a CPU multiplies with MKL. In `any_order` the product is computed as a 1×1 convolution by oneDNN, always
    into fresh memory. oneDNN adds up in another order, and is faster on AMD's processors (docs/performance.md).
    """
    with torch.autocast(tokens.device.type, enabled=False):  # the types were chosen before
        if any_order and _may_be_convolved(tokens):
            product = F.conv2d(_pixels(tokens), matrix.back[..., None, None])  # [1, M, 1, n], channels-last
            return product.permute(0, 2, 3, 1).view(len(tokens), len(matrix.back))
        out = None if scratch is None else scratch.view(len(tokens), len(matrix.back))
        return torch.mm(tokens, matrix.forth, out=out)


def _add_gradient(total: Tensor, gradient: Tensor, tokens: Tensor) -> None:
    """Add the gradient of a matrix `[M, K]` to `total`.

    `gradient` `[n, M]` is that of its products with `tokens` `[n, K]`. Sums in any order.
    """
    if not _may_be_convolved(tokens):
        add_product(total, gradient.T, tokens)
        return
    found: Tensor = conv2d_weight(_pixels(tokens), [*total.shape, 1, 1], _pixels(gradient))  # type: ignore[no-untyped-call]
    total += found[..., 0, 0]


def _may_be_convolved(tokens: Tensor) -> bool:
    return tokens.is_cpu and tokens.dtype == torch.float32


def _pixels(tokens: Tensor) -> Tensor:
    """`[n, K]` → `[1, K, 1, n]`, channels-last."""
    return tokens.view(1, 1, *tokens.shape).permute(0, 3, 1, 2)


def _pair(source: Tensor, message: Tensor, scratch: Scratch) -> Tensor:
    """`[n, C]` each → `[n, 2C]`, in the type of the scratch."""
    pair = scratch.view(len(source), 2 * source.shape[1])
    return torch.cat([source.to(pair.dtype), message.to(pair.dtype)], dim=1, out=pair)


def _gelu(before: Tensor, scratch: Scratch) -> Tensor:
    activated: Tensor = torch.ops.aten.gelu.out(before, out=scratch.view(*before.shape))
    return activated
