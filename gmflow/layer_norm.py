"""LayerNorm's backward pass for functions that work on chunks of tokens: nothing of the forward pass need be kept."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-5  # PyTorch's default, which `F.layer_norm` takes as well


def layer_norm_backward(gradient: Tensor, tokens: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `F.layer_norm(tokens, (C,), scale, shift)`: of the tokens, the scale and the shift.

    Args:
        gradient: `[T, C]`, of the output.
        tokens: `[T, C]`, the input.
        scale: `[C]`.
        shift: `[C]`.
    """
    channels = [tokens.shape[-1]]
    _, mean, reciprocal_std = torch.native_layer_norm(tokens, channels, scale, shift, _EPS)
    found: tuple[Tensor, ...] = torch.ops.aten.native_layer_norm_backward(
        gradient, tokens, channels, mean, reciprocal_std, scale, shift, [True, True, True]
    )
    return found
