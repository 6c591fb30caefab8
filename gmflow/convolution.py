"""Other backward passes of convolutions; their forward pass stays the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCK = 16
"""Channels that oneDNN computes at a time, at most; with fewer input channels it has the fault described below."""


def mend_backward(convolution: nn.Conv2d) -> None:
    """Avoid two faults of PyTorch's CPU backward pass of 1x1 convolutions on channels-last maps; in place.

    First, the weight's gradient gets channels-last strides. For a 1x1 kernel the memory is the same, but DDP compares
    strides and warns, so the weight is passed as a view that has no such strides. Second, for strided convolutions of
    few input channels oneDNN writes past its buffer, which gives wrong numbers, a hang or a crash
    (https://github.com/uxlfoundation/oneDNN/issues/6035), so the pixels that are read are sliced out first.
    """
    convolution.forward = partial(_mended, convolution)  # type: ignore[method-assign]


def narrow_backward(convolution: nn.Conv2d, dtype: torch.dtype) -> None:
    """Compute the backward pass of a convolution (ungrouped, padded with zeros) in `dtype`; in place.

    The forward pass stays the same, and so do the types of the gradients. A 1x1 convolution gets `mend_backward`, too.
    """
    convolution.forward = partial(_narrowed, convolution, dtype)  # type: ignore[method-assign]


def _factors(convolution: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The maps, weight and stride to compute the convolution with: see `mend_backward`."""
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
