"""Whether sums may be computed in another order than the reference's: float32 then rounds differently, and the model
amplifies that.
"""

from __future__ import annotations

from enum import Enum

import torch

from gmflow.attention import runs_eagerly_on_cpu


class SummationOrder(Enum):
    """Which order the forward pass adds up in. The backward pass always takes the fastest.

    In any order the flow is mostly within 0.01 px of the reference's and gradients within a thousandth
    (docs/performance.md): good enough to train, too far off for comparing flow with the reference to 0.001 px.
    """

    REFERENCE = "the reference's"
    FREE_TO_LEARN = "the reference's, but any on a CPU where gradients are wanted"
    FREE = "any"

    def is_free(self, device: torch.device) -> bool:
        """Whether a forward pass on this device may, in the present gradient mode, add up in any order."""
        if self is SummationOrder.FREE_TO_LEARN:
            return runs_eagerly_on_cpu(device) and torch.is_grad_enabled()
        return self is SummationOrder.FREE
