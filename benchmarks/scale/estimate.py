"""Estimate one curriculum on a number of GPUs: from its stages' work, a machine and what was measured."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.model import matrix_gflop
from benchmarks.scale.machine import LOADED_PER_CORE, Machine
from benchmarks.scale.measuring import Measured
from benchmarks.scale.published import PUBLISHED
from datasets_etl.order import rank_positions
from datasets_etl.sources import EXPECTED_COUNTS
from pipelines.training.config import CurriculumConfig, StageConfig
from pipelines.training.data_config import SetConfig

# For each stage, the dataset whose rate is used.
LOADED_AS = {"chairs": "chairs", "things": "sintel", "sintel": "sintel", "kitti": "kitti"}


@dataclass(frozen=True)
class StageWork:
    """The work of a stage, independent of the machine."""

    stage: StageConfig
    gflop_sample: float
    gflop_validation: float
    validation_reads: int

    @classmethod
    def of(cls, config: CurriculumConfig, stage: StageConfig) -> "StageWork":
        model = config.model.build()
        rounds = 1 if stage.validate_every is None else math.ceil(stage.steps / stage.validate_every)
        pairs = {chosen: _pairs(chosen) for chosen in stage.validation}
        once = sum(number * matrix_gflop(model, *_frame(chosen.data), False) for chosen, number in pairs.items())
        return cls(
            stage,
            matrix_gflop(model, *stage.crop, True),
            rounds * once,
            rounds * sum(pairs.values()),
        )

    @property
    def gflop(self) -> float:
        return self.stage.steps * self.stage.global_batch * self.gflop_sample + self.gflop_validation

    @property
    def reads(self) -> int:
        return self.stage.steps * self.stage.global_batch + self.validation_reads

    @property
    def checkpoints(self) -> int:
        return math.ceil(self.stage.steps / self.stage.checkpoint_every)

    def with_larger_batches(self, times: int) -> "StageWork":
        """The same samples in batches `times` as large, with as many fewer steps."""
        batch, steps = self.stage.global_batch * times, self.stage.steps // times
        return dataclasses.replace(self, stage=self.stage.model_copy(update={"global_batch": batch, "steps": steps}))

    def seconds(self, machine: Machine, world: int, measured: Measured) -> tuple[float, float]:
        """Seconds (computing, in all-reduces). Ranks wait for the one with the most samples; nothing overlaps."""
        largest = max(len(rank_positions(0, self.stage.global_batch, rank, world)) for rank in range(world))
        computing = self.stage.steps * machine.pass_seconds(largest, self.gflop_sample)
        computing += machine.sample_seconds(self.gflop_validation) / world
        meeting = self.stage.steps * machine.all_reduce_seconds(measured.parameter_bytes, world)
        return computing, meeting


def _pairs(chosen: SetConfig) -> int:
    return min(EXPECTED_COUNTS[chosen.data][chosen.subset], chosen.limit or 10**9)


def _frame(dataset: str) -> tuple[int, int]:
    """Height and width of validation frames, padded to a size that the model accepts."""
    return {"chairs": (384, 512), "things": (544, 960), "sintel": (448, 1024), "kitti": (384, 1248)}[dataset]


@dataclass(frozen=True)
class Outcome:
    """The figures of a curriculum on some number of GPUs."""

    gpus: int
    used: int
    hours: float
    meeting: float
    samples_per_second: float
    bytes_per_second: float
    cores_per_gpu: float
    dollars: float


def run_on(gpus: int, work: Sequence[StageWork], machine: Machine, measured: Measured) -> Outcome:
    """One run. Each stage uses no more GPUs than its global batch has samples, but all GPUs are paid for."""
    seconds = meeting = 0.0
    busiest = read = cores = 0.0
    for each in work:
        world = min(gpus, each.stage.global_batch)
        computing, met = each.seconds(machine, world, measured)
        seconds, meeting = seconds + computing + met, meeting + met
        rate = each.stage.steps * each.stage.global_batch / (computing + met)
        busiest = max(busiest, rate)
        read = max(read, rate * measured.sample_bytes.get(each.stage.mixture[0].data, math.nan))
        cores = max(cores, rate / world / LOADED_PER_CORE[LOADED_AS[each.stage.name]])
    return Outcome(
        gpus=gpus,
        used=min(gpus, max(each.stage.global_batch for each in work)),
        hours=seconds / 3600,
        meeting=meeting / seconds,
        samples_per_second=busiest,
        bytes_per_second=read,
        cores_per_gpu=cores,
        dollars=gpus * seconds / 3600 * PUBLISHED.dollars_per_gpu_hour,
    )
