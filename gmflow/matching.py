"""Flow as the expected position of the best match (paper, "Formulation" and "Refinement")."""

from __future__ import annotations

import torch
from torch import Tensor

from gmflow.attention import attention, neighbourhood_attention
from gmflow.config import GLOBAL
from gmflow.geometry import pixel_grid


def match(feature0: Tensor, feature1: Tensor, radius: int) -> Tensor:
    """Flow from softmax(⟨f0, f1⟩ / √C) over positions of image 1.

    Always in float32: positions of hundreds of pixels must be exact to a fraction of a pixel.

    Args:
        feature0: `[B, h, w, C]`.
        feature1: `[B, h, w, C]`.
        radius: -1 matches with the whole map, otherwise with the (2·radius+1)² neighbours inside it.

    Returns:
        Flow `[B, 2, h, w]` in feature pixels.
    """
    batch, height, width, _ = feature0.shape
    with torch.autocast(feature0.device.type, enabled=False):
        feature0, feature1 = feature0.float(), feature1.float()
        own = pixel_grid(height, width, feature0.device)  # [h, w, 2]
        positions = own.expand(batch, -1, -1, -1)
        if radius == GLOBAL:
            expected = attention(feature0.flatten(1, 2), feature1.flatten(1, 2), positions.flatten(1, 2))
            expected = expected.view(batch, height, width, 2)
        else:
            expected = neighbourhood_attention(feature0, feature1, positions, radius, exclude_outside=True)
        return (expected - own).permute(0, 3, 1, 2)
