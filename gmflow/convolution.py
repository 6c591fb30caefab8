"""How the gradients of a convolution come about, while what it computes stays the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def narrow_way_back(convolution: nn.Conv2d, dtype: torch.dtype) -> None:
    """Let the gradients of a convolution (ungrouped, zero padding) be products of `dtype`; changes it in place.

    What it computes stays the same, and its gradients keep the type of what they are gradients of.
    """
    convolution.forward = partial(_forward, convolution, dtype)  # type: ignore[method-assign]


def keep_strides(convolution: nn.Conv2d) -> None:
    """Let the gradient of the weight of a 1×1 convolution have the weight's strides; changes it in place.

    From channels-last maps it lies the same in memory, but is told of by others, which DDP takes for a mismatch.
    """
    convolution.forward = partial(_by_rows, convolution)  # type: ignore[method-assign]


def _by_rows(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    rows = convolution.weight.flatten(1)  # [C_out, C_in]
    return torch.conv2d(x, rows[..., None, None], convolution.bias, convolution.stride, convolution.padding)


def _forward(convolution: nn.Conv2d, dtype: torch.dtype, x: Tensor) -> Tensor:
    found: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
        x, convolution.weight, convolution.bias, convolution.stride, convolution.padding, dtype
    )
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
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
        assert for_weight is not None
        return for_x, for_weight.flatten(1).view_as(weight), for_bias, None, None, None  # as in `keep_strides`
