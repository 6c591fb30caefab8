"""The part of a config that says how machines are used; it never changes the recipe."""

from pathlib import Path
from typing import Literal, Self

import pydantic
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from datasets_etl.cache import SampleCache
from gmflow.execution import ExecutionConfig, Precision
from pipelines.config_file import Frozen


class CacheConfig(Frozen):
    """A folder on each machine's own disk that keeps samples read from storage.

    It takes no more samples when little of the disk is free: 5 % of it or 2 GiB, whichever is less.

    Attributes:
        folder: an absolute path, or one that begins with ~.
        gib: its largest size, in GiB.
    """

    folder: str
    gib: PositiveFloat

    @pydantic.field_validator("folder")
    @classmethod
    def _is_the_same_for_all(cls, folder: str) -> str:
        """Refuses a relative path: each worker has its own working folder, which disappears with Ray."""
        if not Path(folder).expanduser().is_absolute():
            raise ValueError(f"{folder}: give an absolute path, such as /scratch/gmflow")
        return folder

    def build(self) -> SampleCache:
        return SampleCache(Path(self.folder).expanduser(), int(self.gib * 2**30))


class MachineConfig(Frozen):
    """How the machine is used: this changes speed and memory, never the recipe. What differs is rounding
    (docs/fault-tolerance.md).

    Attributes:
        num_workers: number of data-parallel workers.
        min_workers: continue with as few workers as this while machines are missing; None: wait for all of them.
        grow_interval_s: how often (s) to check whether more workers fit, while training runs with fewer; Ray itself
            notices a new machine within 20 s.
        cpus_per_worker, use_gpu: the resources that each worker takes from the cluster.
        placement: "pack": workers on as few nodes as possible; "spread": on as many nodes as possible; "strict_spread":
            each worker must have its own node.
        micro_batch: samples that a worker computes at a time; gradients are accumulated up to the recipe's batch.
        loader_workers: processes of each worker that read and augment samples; 0: the worker does it itself.
        cache: keeps samples on the machines' own disks; None: each sample is read from storage every time.
        checkpointing: which activations are recomputed in the backward pass instead of kept.
        compile: run the model through torch.compile; the machine must have a compiler (the image has one).
        replay: on GPUs, record a step's operations once and replay them, unless the model is compiled. The bits are the
            same. Small micro-batches take less time, but the recordings hold memory that validation cannot use.
        max_failures: how often a stage is restarted after a worker failed, without a new checkpoint in between; 0:
            never.
        hang_timeout_s: a worker without progress for this long is ended, so that the stage resumes.
        storage_patience_s: how long workers and driver wait for storage that is unreachable.
    """

    num_workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    grow_interval_s: PositiveFloat = 60.0
    use_gpu: bool = False
    cpus_per_worker: PositiveInt = 1
    placement: Literal["pack", "spread", "strict_spread"] = "pack"
    micro_batch: PositiveInt = 1
    loader_workers: NonNegativeInt = 0
    cache: CacheConfig | None = None
    checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    replay: bool = True
    max_failures: NonNegativeInt = 3
    hang_timeout_s: PositiveFloat = 900.0
    storage_patience_s: PositiveFloat = 120.0

    @pydantic.model_validator(mode="after")
    def _limits_fit_together(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is above num_workers {self.num_workers}")
        if self.min_workers is not None and self.placement == "strict_spread":
            raise ValueError(
                "min_workers needs placement pack or spread: Ray counts how many workers fit by the nodes' resources, "
                "not by the number of nodes"
            )
        if self.hang_timeout_s <= 2 * self.storage_patience_s:
            raise ValueError(
                f"hang_timeout_s {self.hang_timeout_s:g} must be above twice storage_patience_s "
                f"{self.storage_patience_s:g}: a worker whose last two checkpoints wait for storage does not hang"
            )
        return self

    def execution(self, precision: Precision, *, ddp: bool = False) -> ExecutionConfig:
        """How a model is run for training on this machine."""
        return ExecutionConfig(
            precision=precision,
            checkpointing=self.checkpointing,
            compile=self.compile,
            ddp=ddp,
            replay=self.replay and not self.compile,
            same_bits=True,
        )
