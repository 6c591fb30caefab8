"""Settings of a whole process, or of its threads, under which a model runs fast or sums in one order."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Of OpenMP's omp.h: omp_pause_soft.
_KEEP_STATE = 1


def allow_tf32(*, rounds: bool) -> None:
    """Whether NVIDIA GPUs may round the factors of float32 products; PyTorch's default rounds convolutions' only."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounds


def sum_in_order() -> None:
    """No kernels whose threads add up in the order in which they come."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a help for debugging that takes time
    torch.use_deterministic_algorithms(True)


def keep_freed_memory_for_reuse() -> None:
    """glibc's allocator gives freed memory to the next tensor, not back to the system.

    By default large tensors are fresh pages each time, which the system zeroes one by one: a sixth of the time of
    inference (docs/performance.md). The process then keeps as much as it needed at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def flush_denormals() -> None:
    """Numbers below 1e-38 become zero in this thread and in those that PyTorch computes with for it.

    Attention's weights fade out through such numbers, and so do their gradients. Processors may take a hundred times
    as long for each: a sixth of a training step (docs/performance.md). No weight of that size moves a sum by a bit.
    """
    if not torch.set_flush_denormal(True):  # this processor cannot
        return
    # Threads take the setting over from the one that starts them. Those that are there already, idle between two
    # operations, are ended; the next operation starts others. Libraries of other compilers take it over each time.
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        end_idle_threads = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)
        if end_idle_threads is not None:
            end_idle_threads(_KEEP_STATE)
