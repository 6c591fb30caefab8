"""Where a feature is inside its attention window, as sines and cosines (paper, "Feature Enhancement")."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def position_encoding(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Fixed 2-D encoding of a window: float32 `[height, width, channels]`.

    The first half of the channels encodes y, the second x: sine and cosine in turn, of the coordinates 1..n scaled
    to 2π.
    """
    half = channels // 2
    exponent = 2 * torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") / half
    period = TEMPERATURE**exponent  # [C/2]
    y = _waves(height, period).unsqueeze(1).expand(height, width, half)
    x = _waves(width, period).unsqueeze(0).expand(height, width, half)
    return torch.cat([y, x], dim=-1)


def _waves(length: int, period: Tensor) -> Tensor:
    coordinate = torch.arange(1, length + 1, dtype=torch.float32, device=period.device)
    angle = (coordinate / (length + 1e-6) * (2 * math.pi)).unsqueeze(-1) / period  # [length, C/2]
    return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)
