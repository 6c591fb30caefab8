"""In which order sums may be added up: float32 rounds otherwise in another, and the model magnifies that."""

from __future__ import annotations

from enum import Enum

import torch

from gmflow.attention import computes_in_chunks


class Order(Enum):
    """Of the terms of sums on the way to the loss; on the way back they are added up as is the fastest.

    The flow is mostly within 0.01 px of the reference's in any order, and gradients within a thousandth
    (docs/performance.md): enough to learn by, and not enough to be compared with it to 0.001 px.
    """

    REFERENCE = "the reference's"
    FREE_TO_LEARN = "the reference's, but any on a CPU where gradients are wanted"
    FREE = "any"

    def is_free(self, device: torch.device) -> bool:
        """Whether what is computed there now may be added up in any order."""
        if self is Order.FREE_TO_LEARN:
            return computes_in_chunks(device) and torch.is_grad_enabled()
        return self is Order.FREE
