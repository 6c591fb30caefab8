"""Flow spread from matched to unmatched pixels that look alike (paper, "Flow Propagation")."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gmflow.attention import attention, neighbourhood_attention
from gmflow.config import GLOBAL


class FlowPropagation(nn.Module):
    """Self-attention of feature 0 with the flow as value."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        for projection in (self.query, self.key):
            nn.init.xavier_uniform_(projection.weight)

    def forward(self, feature: Tensor, flow: Tensor, radius: int) -> Tensor:
        """Always in float32, as `match` is.

        Args:
            feature: `[B, h, w, C]`.
            flow: `[B, 2, h, w]`; no gradient flows into it.
            radius: -1 attends to the whole map, otherwise to the (2·radius+1)² neighbours, those outside the map
                included with a zero key and a zero flow.

        Returns:
            `[B, 2, h, w]`.
        """
        batch, height, width, _ = feature.shape
        with torch.autocast(feature.device.type, enabled=False):
            feature = feature.float()
            value = flow.detach().float().permute(0, 2, 3, 1)  # [B, h, w, 2]
            query = self.query(feature)
            if radius == GLOBAL:
                # The published weights were trained with a key that projects the query, not the feature.
                key = self.key(query)
                spread = attention(query.flatten(1, 2), key.flatten(1, 2), value.flatten(1, 2))
                spread = spread.view(batch, height, width, 2)
            else:
                key = self.key(feature)
                spread = neighbourhood_attention(query, key, value, radius, exclude_outside=False)
            return spread.permute(0, 3, 1, 2)
