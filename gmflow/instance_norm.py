"""Instance normalisation that keeps the memory layout of maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_EPS = 1e-5  # PyTorch's default, which `F.instance_norm` takes as well


def instance_norm(maps: Tensor) -> Tensor:
    """`F.instance_norm` of `[N, C, H, W]`.

    That function would first make channels-last maps contiguous. Here they are normalised one by one instead, as
    batches of one, which gives the same numbers except for rounding.
    """
    if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return F.instance_norm(maps, eps=_EPS)
    out: Tensor = _OneByOne.apply(maps)  # type: ignore[no-untyped-call]
    return out


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        out = torch.empty_like(maps)
        statistics = maps.new_empty(len(maps), 2, maps.shape[1])
        for one, normalised, (mean, reciprocal_std) in zip(
            torch.split(maps, 1), torch.split(out, 1), statistics.unbind(), strict=True
        ):
            torch.ops.aten.native_batch_norm.out(
                one, None, None, None, None, True, 0.0, _EPS, out=normalised, save_mean=mean, save_invstd=reciprocal_std
            )
        ctx.save_for_backward(maps, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        maps, statistics = ctx.saved_tensors
        found = torch.empty_like(maps)
        for upper, one, of_one, (mean, reciprocal_std) in zip(
            *(torch.split(whole, 1) for whole in (gradient, maps, found)), statistics.unbind(), strict=True
        ):
            of_maps, *_ = torch.ops.aten.native_batch_norm_backward(
                upper, one, None, None, None, mean, reciprocal_std, True, _EPS, [True, False, False]
            )
            of_one.copy_(of_maps)
        return found
