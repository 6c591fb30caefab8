"""Convex upsampling: each fine pixel's flow is a learned average of 3×3 coarse ones, as in RAFT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN_CHANNELS = 256


class ConvexUpsampler(nn.Module):
    """Predicts the averaging weights from the flow and feature 0."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.hidden = nn.Conv2d(2 + channels, HIDDEN_CHANNELS, 3, padding=1)
        self.weights = nn.Conv2d(HIDDEN_CHANNELS, 9 * factor**2, 1)

    def forward(self, flow: Tensor, feature: Tensor) -> Tensor:
        """Flow `[B, 2, h, w]` and feature `[B, C, h, w]` → flow `[B, 2, factor*h, factor*w]`, in fine pixels."""
        logits = self.weights(self.hidden(torch.cat([flow, feature], dim=1)).relu_())
        return convex_upsample(flow, logits.float(), self.factor)


def convex_upsample(flow: Tensor, logits: Tensor, factor: int) -> Tensor:
    """Flow `[B, 2, h, w]`, logits `[B, 9·factor², h, w]` → `[B, 2, factor*h, factor*w]`.

    The logits hold nine values for each fine pixel: channel k·factor² + y·factor + x is neighbour k, in reading
    order, of fine pixel (y, x). Neighbours outside the map are zero.
    """
    batch, _, height, width = flow.shape
    # Sub-pixels in a dimension of their own before h and w, so that the sum over neighbours runs over contiguous rows.
    weights = logits.view(batch, 9, factor**2, height, width).softmax(dim=1)  # [B, 9, s², h, w]
    padded = F.pad(factor * flow, (1, 1, 1, 1))
    neighbours = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    fine = torch.zeros_like(flow).unsqueeze(2)
    for weight, neighbour in zip(weights.unbind(1), neighbours, strict=True):
        fine = fine + weight.unsqueeze(1) * neighbour.unsqueeze(2)  # [B, 2, s², h, w]
    fine = fine.view(batch, 2, factor, factor, height, width).permute(0, 1, 4, 2, 5, 3)
    return fine.reshape(batch, 2, factor * height, factor * width)
