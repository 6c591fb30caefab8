"""Small models and frames that tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gmflow import (
    GMFlow,
    GMFlowConfig,
)

TINY: dict[str, Any] = {"backbone_channels": (4, 6, 8), "feature_channels": 8, "num_layers": 2, "ffn_expansion": 2}
BASE = GMFlowConfig(**TINY)
REFINE = GMFlowConfig(num_scales=2, **TINY, attn_splits=(2, 8), corr_radius=(-1, 4), prop_radius=(-1, 1))


def tiny(config: GMFlowConfig = REFINE) -> GMFlow:
    torch.manual_seed(0)
    return GMFlow(config)


def frames(height: int, width: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(2)]
