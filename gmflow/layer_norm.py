"""LayerNorm for functions that work on chunks of tokens and keep only its statistics for the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EPS = 1e-5  # PyTorch's default, which `F.layer_norm` takes as well


class Statistics(NamedTuple):
    """Over each token's channels: `[T, 1]` each."""

    mean: Tensor
    reciprocal_std: Tensor


def layer_norm(tokens: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Statistics]:
    """`F.layer_norm` of `[T, C]` over the channels, and what its backward pass needs besides the tokens."""
    out, *statistics = torch.native_layer_norm(tokens, list(scale.shape), scale, shift, _EPS)
    return out, Statistics(*statistics)


def layer_norm_backward(
    gradient: Tensor, tokens: Tensor, statistics: Statistics, scale: Tensor, shift: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of `layer_norm(tokens, scale, shift)`: of the tokens, the scale and the shift.

    Args:
        gradient: gradient of the output, `[T, C]`.
        tokens: the input, `[T, C]`.
        statistics: as `layer_norm` returned them.
        scale: `[C]`.
        shift: `[C]`.
    """
    found: tuple[Tensor, ...] = torch.ops.aten.native_layer_norm_backward(
        gradient, tokens, list(scale.shape), *statistics, scale, shift, [True, True, True]
    )
    return found
