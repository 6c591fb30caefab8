"""Products in float32 whose factors have no more bits than bf16: exact, and at the speed of bf16's units."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_inside = 0
_before = "none"


@contextlib.contextmanager
def short_factors() -> Iterator[None]:
    """Within the block a CPU with units for bf16 may round the factors of float32 products to bf16.

    Factors that were rounded before lose nothing, and the sums stay float32: a product of bf16 tensors would round
    those as well. PyTorch knows the setting for a whole process only, so float32 products that another thread
    makes meanwhile are rounded too.
    """
    global _inside, _before
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _lock:
        if _inside == 0:
            _before = products.fp32_precision
            products.fp32_precision = "bf16"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                products.fp32_precision = _before
