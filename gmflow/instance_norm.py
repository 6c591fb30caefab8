"""Instance normalisation that leaves the layout of maps as it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-5  # PyTorch's default, which `F.instance_norm` takes as well


def instance_norm(maps: Tensor) -> Tensor:
    """`F.instance_norm` of `[N, C, H, W]`, which would make channels-last maps contiguous first.

    Those are normalised one by one instead, as batches of one: the same numbers but for rounding.
    """
    if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return F.instance_norm(maps, eps=_EPS)
    if torch.is_grad_enabled() and maps.requires_grad:
        return torch.cat([F.batch_norm(one, None, None, training=True, eps=_EPS) for one in torch.split(maps, 1)])
    out, mean, reciprocal_std = torch.empty_like(maps), *maps.new_empty(2, maps.shape[1]).unbind()
    for index in range(len(maps)):
        one = slice(index, index + 1)
        torch.ops.aten.native_batch_norm.out(
            maps[one], None, None, None, None, True, 0.0, _EPS, out=out[one], save_mean=mean, save_invstd=reciprocal_std
        )
    return out
