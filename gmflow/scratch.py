"""What layers that are computed chunk by chunk share: matrices, scratch memory, and sums of products."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """A layer's matrix, in the two layouts that the products of many chunks take.

    On a CPU a product with a transposed view has the same bits and takes up to a fifth longer.
    """

    forth: Tensor
    """`[in, out]`: the forward pass multiplies tokens by it."""
    back: Tensor
    """`[out, in]`: the backward pass multiplies gradients by it."""

    @classmethod
    def of(cls, weight: Tensor) -> Matrix:
        """From the weight `[out, in]` of a linear layer, or several weights on top of each other."""
        return cls(weight.T.contiguous() if weight.is_cpu else weight.T, weight)

    @property
    def reversed(self) -> Matrix:
        """The two layouts exchanged, for functions that multiply by `forth`, in the backward pass."""
        return Matrix(self.back, self.forth)


class Scratch:
    """Memory that every chunk overwrites: it stays in the cache, and no fresh pages are asked of the system.

    Args:
        like: a tensor of the wanted type, on the wanted device.
    """

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def view(self, *shape: int) -> Tensor:
        """Uninitialised memory of this shape. It overlaps with every earlier view."""
        size = prod(shape)
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(shape)


def put_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Write `left` · `right`, matrices or batches of matrices, into `total`, which is of the same or a wider type."""
    multiply = torch.mm if total.dim() == 2 else torch.bmm
    if total.dtype == left.dtype:
        multiply(left, right, out=total)
    elif total.is_cuda:  # one operation adds up and writes in the wider type
        multiply(left, right, out_dtype=total.dtype, out=total)
    else:
        total.copy_(left @ right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left` · `right`, matrices or batches of matrices, to `total`, which is of the same or a wider type."""
    multiply = torch.addmm if total.dim() == 2 else torch.baddbmm
    if total.dtype == left.dtype:
        multiply(total, left, right, out=total)
    elif total.is_cuda:
        multiply(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
