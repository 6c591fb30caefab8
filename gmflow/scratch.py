"""What layers that are computed chunk by chunk have in common: matrices, memory that all chunks use, and sums."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """A layer's matrix, laid out for the products of many chunks.

    On a CPU the product with a transposed one has the same bits and takes up to a fifth longer.
    """

    forth: Tensor
    """`[in, out]`: tokens times it are what the layer computes."""
    back: Tensor
    """`[out, in]`: the way back."""

    @classmethod
    def of(cls, weight: Tensor) -> Matrix:
        """Of the weight `[out, in]` of a linear layer, or of some of them on top of each other."""
        return cls(weight.T.contiguous() if weight.is_cpu else weight.T, weight)

    @property
    def reversed(self) -> Matrix:
        """For products on the way back."""
        return Matrix(self.back, self.forth)


class Scratch:
    """Memory that is written anew for every chunk: it stays in the cache, and no fresh pages are asked for.

    Args:
        like: a tensor of the type and on the device it should have.
    """

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def view(self, *shape: int) -> Tensor:
        """Uninitialised memory of this shape; what was viewed before is overwritten."""
        size = prod(shape)
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(shape)


def put_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Write `left` · `right`, of matrices or of batches of them, to memory of the same or a wider type."""
    multiply = torch.mm if total.dim() == 2 else torch.bmm
    if total.dtype == left.dtype:
        multiply(left, right, out=total)
    elif total.is_cuda:  # which adds up in the wider type, and writes it without another pass
        multiply(left, right, out_dtype=total.dtype, out=total)
    else:
        total.copy_(left @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left` · `right`, of matrices or of batches of them, to a total of the same or a wider type."""
    multiply = torch.addmm if total.dim() == 2 else torch.baddbmm
    if total.dtype == left.dtype:
        multiply(total, left, right, out=total)
    elif total.is_cuda:
        multiply(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
