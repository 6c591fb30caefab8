"""The memory of a process and its GPU: its peak, and what a user can do where it does not suffice."""

import contextlib
import resource
from collections.abc import Iterator

import torch

from pipelines.entry import PipelineError


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: of tensors on the GPU if that is the device, else of this process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def explaining_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Raises PipelineError if memory does not suffice for `what` within the block; it names the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_lack_of_memory(error):
            raise
        whose = "the GPU's" if isinstance(error, torch.OutOfMemoryError) else "this machine's"
        raise PipelineError(f"{what}: {whose} memory does not suffice; try {remedy}") from error


def is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether PyTorch raised this because a tensor did not fit. On a CPU that is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
