"""How much memory a process has used."""

import resource

import torch


def peak_bytes(device: torch.device) -> int:
    """The most so far: of an accelerator's tensors where that is the device, else of this process, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
