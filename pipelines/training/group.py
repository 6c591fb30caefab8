"""The workers of a stage as one of them sees them: its rank, sums over all ranks, preemption notices."""

import time

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import PreemptionInfo

# The ranks ask Ray only this often whether one of their machines has a preemption notice: asking is a collective.
_NOTICE_INTERVAL_S = 2.0


class WorkerGroup:
    """The data-parallel workers that Ray Train has started together.

    Attributes:
        rank: this worker's number, from 0.
        world_size: number of workers.
        first_on_node: whether this is the node's worker that reports what concerns the node.
        device: where this worker computes.
    """

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.first_on_node = context.get_local_rank() == 0
        self.device = ray.train.torch.get_device()
        self._asked = time.monotonic()

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all ranks, in place. A collective; returns `values`."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank. A collective."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)))

    def notice_check_due(self) -> bool:
        """Whether it is time to ask for a preemption notice. True on rank 0 alone: its clock decides for all ranks."""
        return self.rank == 0 and time.monotonic() - self._asked > _NOTICE_INTERVAL_S

    def preemption_notice(self) -> PreemptionInfo | None:
        """Ray's notice that a machine of this group will be taken away, if there is one. A collective."""
        self._asked = time.monotonic()
        return ray.train.get_preemption_info()
