"""How the gradients of a convolution come about, while what it computes stays the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 16
"""Channels that a CPU computes at a time, at most."""


def mend_way_back(convolution: nn.Conv2d) -> None:
    """Keep a 1×1 convolution of channels-last maps from what a CPU makes of its gradients; changes it in place.

    The weight's has its strides then. It would lie the same, told of by others, which DDP takes for a mismatch. And a
    strided one reads places that are cut out beforehand: from maps of few channels, oneDNN writes past its memory on
    the way back, which ends in wrong numbers, a hang or a crash (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convolution.forward = partial(_mended, convolution)  # type: ignore[method-assign]


def narrow_way_back(convolution: nn.Conv2d, dtype: torch.dtype) -> None:
    """Let the gradients of a convolution (ungrouped, zero padding) be products of `dtype`; changes it in place.

    What it computes stays the same, and its gradients keep the type of what they are gradients of. A 1×1 convolution is
    mended, too.
    """
    convolution.forward = partial(_narrowed, convolution, dtype)  # type: ignore[method-assign]


def _factors(convolution: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Maps, weight and stride that a convolution is computed of."""
    weight, stride = convolution.weight, convolution.stride
    if convolution.kernel_size != (1, 1) or not (x.is_cpu and torch.is_grad_enabled()):
        return x, weight, stride
    if convolution.in_channels < _BLOCK and not x.is_contiguous():
        x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
    return x, weight.flatten(1)[..., None, None], stride


def _mended(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    x, weight, stride = _factors(convolution, x)
    return torch.conv2d(x, weight, convolution.bias, stride, convolution.padding)


def _narrowed(convolution: nn.Conv2d, dtype: torch.dtype, x: Tensor) -> Tensor:
    x, weight, stride = _factors(convolution, x)
    found: Tensor = _Convolution.apply(x, weight, convolution.bias, stride, convolution.padding, dtype)  # type: ignore[no-untyped-call]
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.dtype, ctx.biased = stride, padding, dtype, bias is not None
        return torch.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        found = torch.ops.aten.convolution_backward(
            *(tensor.to(ctx.dtype) for tensor in (gradient, x, weight)),
            [len(weight)],
            ctx.stride,
            ctx.padding,
            (1, 1),  # dilation
            False,  # not transposed
            (0, 0),
            1,  # group
            (ctx.needs_input_grad[0], True, ctx.biased),
        )
        for_x, for_weight, for_bias = (None if one is None else one.to(weight.dtype) for one in found)
        return for_x, for_weight, for_bias, None, None, None
