"""Settings of a whole process, or of its threads, that make a model fast or its sums repeatable."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# From OpenMP's omp.h: omp_pause_soft.
_KEEP_STATE = 1


def allow_tf32(*, rounds: bool) -> None:
    """Set whether NVIDIA GPUs round the factors of float32 products. By default PyTorch does in convolutions alone."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounds


def sum_in_order() -> None:
    """Let PyTorch use no kernel whose threads add up in an order that varies from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it helps debugging and takes time
    torch.use_deterministic_algorithms(True)


def keep_freed_memory_for_reuse() -> None:
    """Let glibc's allocator keep freed memory for the next tensor instead of giving it back to the system.

    By default every large tensor gets fresh pages, which the system zeroes one by one: a sixth of the time of inference
    (docs/performance.md). With this, the process keeps as much memory as it needed at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def flush_denormals() -> None:
    """Take numbers below 1e-38 for zero, in this thread and in the threads that PyTorch computes with for it.

    The smallest softmax weights of attention are such numbers, and so are their gradients. Processors may take a
    hundred times as long for each: a sixth of a training step (docs/performance.md). A weight of that size changes no
    bit of a sum.
    """
    if not torch.set_flush_denormal(True):  # this processor cannot
        return
    # A thread takes the setting over from the one that starts it. Threads that were started before are idle between two
    # operations; they are ended here, and the next operation starts others. This is GNU's OpenMP; other libraries of
    # OpenMP take the setting over in every operation.
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        end_idle_threads = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)
        if end_idle_threads is not None:
            end_idle_threads(_KEEP_STATE)
