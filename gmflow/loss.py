"""The supervised loss over a sequence of predictions (paper, "Training Loss")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gmflow.errors import GMFlowError
from gmflow.geometry import vector_length

LARGEST_COMPONENT = 1000.0
"""Dense ground truth marks unknown pixels with components of at least this (FlyingChairs, Sintel, FlyingThings3D)."""

MAX_FLOW = 400.0
"""Faster ground truth, in pixels a frame, is left out, as in the reference implementation."""


def sequence_loss(
    predictions: Sequence[Tensor],
    flow: Tensor,
    valid: Tensor,
    *,
    gamma: float = 0.9,
    max_flow: float = MAX_FLOW,
    normalizer: float | None = None,
) -> Tensor:
    """Σ_i γ^(N-1-i) · mean over all B·2·H·W entries of valid · |prediction_i - flow|.

    Args:
        predictions: N tensors `[B, 2, H, W]`, final last, pixels.
        flow: ground truth `[B, 2, H, W]`, pixels; may hold NaN and inf where it is unknown.
        valid: bool `[B, H, W]`. Pixels with a non-finite component, a component of 1000 px or more, or a speed of
            `max_flow` or more are left out as well.
        gamma: weight of a prediction over that of the next.
        max_flow: pixels.
        normalizer: takes the place of B in the divisor. With the size of a global batch, the losses of its parts add
            up to the loss of the whole, however it is split.

    Returns:
        A scalar, float32.

    Raises:
        GMFlowError: the shapes do not fit together, or there is no prediction.
    """
    _check_shapes(predictions, flow, valid)
    flow = flow.float()
    batch = flow.shape[0] if normalizer is None else normalizer
    divisor = batch * flow[0].numel()
    supervised = valid_pixels(flow, valid, max_flow=max_flow).unsqueeze(1)  # [B, 1, H, W]
    total = flow.new_zeros(())
    for index, prediction in enumerate(predictions):
        # A product with the mask would not do: 0 · NaN is NaN, in the loss and in its gradient.
        error = torch.where(supervised, prediction.float() - flow, 0.0).abs().sum()
        total = total + gamma ** (len(predictions) - 1 - index) * error / divisor
    return total


def _check_shapes(predictions: Sequence[Tensor], flow: Tensor, valid: Tensor) -> None:
    pixels = (*flow.shape[:1], *flow.shape[2:])
    fit = all(prediction.shape == flow.shape for prediction in predictions) and valid.shape == pixels
    if flow.dim() != 4 or flow.shape[1] != 2 or not fit or not predictions:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (*predictions, flow, valid))
        raise GMFlowError(f"a loss needs predictions and flow [B, 2, H, W] and valid [B, H, W], not {shapes}")


def valid_pixels(flow: Tensor, valid: Tensor, *, max_flow: float = MAX_FLOW) -> Tensor:
    """Where ground truth `[B, 2, H, W]` can be learned from: bool `[B, H, W]`, never where it is NaN or inf."""
    known = (flow.abs() < LARGEST_COMPONENT).all(dim=1)  # false for NaN and inf
    slow = vector_length(flow.float()) < max_flow  # squares of 16 bits overflow beyond 255 px
    usable: Tensor = valid.bool() & known & slow
    return usable
