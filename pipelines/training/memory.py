"""The peak memory of a process."""

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: of tensors on the GPU if that is the device, else of this process (resident)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
