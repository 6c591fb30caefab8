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
    """Raises PipelineError if a GPU's memory does not suffice for `what` within the block; it names the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PipelineError(f"{what}: the GPU's memory does not suffice; try {remedy}") from error
