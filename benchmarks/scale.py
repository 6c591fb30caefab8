"""Estimate one whole curriculum on 1 to 1,000 GPUs: compute, network, storage, cost, and what limits it first.

    python -m benchmarks.scale                          # everything, about two minutes; real samples by GMFLOW_SAMPLES
    python -m benchmarks.scale --variant base --precision bf16
    python -m benchmarks.scale --only manifest --shards 100000

These figures come from the project's own code: operations of the model (the formulas of `benchmarks.model`), bytes of
its parameters, gradients and checkpoints, bytes per sample in real shards, and order and manifest at 10⁶ shards. The
model's speed was measured on one H100 (`SPEEDS`). Published figures are in `PUBLISHED`.
"""

import argparse
import dataclasses
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.model import VARIANTS, matrix_gflop
from datasets_etl.manifest import Manifest, SampleEntry, ShardEntry
from datasets_etl.order import Order, rank_positions
from datasets_etl.shards import plan_shards, write_shard
from datasets_etl.sources import EXPECTED_COUNTS, SOURCES, SourceTree
from datasets_etl.storage import open_store
from gmflow import GMFlow
from pipelines.arguments import positive
from pipelines.config_file import load_config
from pipelines.training.config import CurriculumConfig, StageConfig
from pipelines.training.data_config import SetConfig
from pipelines.training.state import TrainingState, to_bytes

console = Console(width=140)


@dataclass(frozen=True)
class Published:
    """Published figures of others, each with its source."""

    # AWS, p5.48xlarge: eight H100, 3,200 Gbit/s between machines, 192 vCPU; EC2 Capacity Blocks' list, us-east-1, 2024.
    gpus_per_machine: int = 8
    network_gbit_s_per_gpu: float = 400.0
    vcpus_per_gpu: int = 24
    dollars_per_gpu_hour: float = 4.916
    # AWS, S3 Standard, us-east-1: price list, and "Optimizing Amazon S3 performance" for rates per prefix.
    dollars_per_1000_gets: float = 0.0004
    dollars_per_1000_puts: float = 0.005
    dollars_per_gb_month: float = 0.023
    gets_per_second_and_prefix: float = 5500.0


PUBLISHED = Published()


@dataclass(frozen=True)
class Speed:
    """Speed of forward and backward passes on a GPU: a pass takes a fixed time, plus its samples' work at `tflops`."""

    fixed_s: float
    tflops: float


# One H100, refine, 384x512 (docs/performance.md): bf16 from batches of 1 and 8, the others from 4 and 8.
SPEEDS = {"fp32": Speed(0.027, 26.8), "tf32": Speed(0.0129, 49.9), "bf16": Speed(0.0186, 66.2)}

# Samples per second that one core decodes and augments, from docs/data.md (python -m benchmarks.data --only loading).
LOADED_PER_CORE = {"chairs": 143.3, "sintel": 67.5, "kitti": 36.3}
# For each stage, the dataset whose rate is used.
LOADED_AS = {"chairs": "chairs", "things": "sintel", "sintel": "sintel", "kitti": "kitti"}

# Latency of a message through switch and driver in one step of a ring; 10 µs is a generous assumption.
RING_STEP_S = 10e-6
UPLOAD_PART_BYTES = 8 * 2**20  # part size of boto3's and pyarrow's multipart uploads


@dataclass(frozen=True)
class Measured:
    """Figures measured on this project's own code and data.

    Attributes:
        parameter_bytes: bytes of the float32 parameters; every step all-reduces the same number of bytes of gradients.
        checkpoint_bytes: size of a stored `TrainingState.snapshot`.
        sample_bytes: mean bytes of a sample in real shards, by dataset; one ranged read fetches one sample.
    """

    parameter_bytes: int
    checkpoint_bytes: int
    sample_bytes: dict[str, float]


@dataclass(frozen=True)
class Machine:
    """A GPU and its network."""

    speed: Speed

    def pass_seconds(self, samples: int, gflop_sample: float) -> float:
        """Seconds of one pass over `samples` samples."""
        return self.speed.fixed_s + self.sample_seconds(gflop_sample) * samples

    def sample_seconds(self, gflop: float) -> float:
        """Seconds that one sample adds to a pass."""
        return gflop / 1e3 / self.speed.tflops

    def all_reduce_seconds(self, size: int, world: int) -> float:
        """Seconds of a ring over the slowest link; NVLink inside a machine is many times as fast and is not counted."""
        if world == 1:
            return 0.0
        per_second = PUBLISHED.network_gbit_s_per_gpu / 8 * 1e9
        return 2 * (world - 1) / world * size / per_second + 2 * (world - 1) * RING_STEP_S


# ------------------------------------------------------------------------------------------------------------ measuring


def measure_model(config: CurriculumConfig) -> tuple[int, int]:
    """Bytes of the parameters, and of a checkpoint."""
    model = GMFlow(config.model.build())
    state = TrainingState.fresh(model, config.stages[0])
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0
    state.optimizer.step()  # Adam's moments exist from the first step on
    return sum(parameter.numel() * 4 for parameter in model.parameters()), len(to_bytes(state.snapshot()))


def measure_samples() -> dict[str, float]:
    """Bytes per sample, by dataset, in shards that this project writes from real samples; empty without them."""
    folders = {"chairs": "FlyingChairs_release", "sintel": "Sintel", "kitti": "KITTI"}
    found: dict[str, float] = {}
    for dataset, folder in folders.items():
        root = Path(os.environ.get("GMFLOW_SAMPLES", "/nowhere")) / folder
        if root.exists():
            found[dataset] = _sharded_bytes(dataset, root)
    root = Path(os.environ.get("GMFLOW_FORMAT_SAMPLES", "/nowhere"))
    for dataset in ("things", "hd1k"):
        for sample in sorted(root.iterdir()) if root.exists() else []:
            if dataset in sample.name.lower().replace("flyingthings3d", "things"):
                found[dataset] = _sharded_bytes(dataset, sample)
    return found


def _sharded_bytes(dataset: str, root: Path) -> float:
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    tree = SourceTree(str(root), files, lambda name: (root / name).read_bytes())
    refs = SOURCES[dataset](tree)
    (plan,) = plan_shards(refs, {ref.key: 1 for ref in refs}, dict.fromkeys(files, ""), 2**40)
    with tempfile.TemporaryDirectory() as folder:
        written = write_shard(plan, tree, open_store(folder))
    if written.entry is None:
        raise RuntimeError(f"{root}: nothing but damaged pairs")
    return sum(sample.length for sample in written.entry.samples) / len(written.entry.samples)


# -------------------------------------------------------------------------------------------------------------- the run


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


def show_work(work: Sequence[StageWork], measured: Measured) -> None:
    table = Table(title="What a curriculum is made of")
    for name in ("stage", "steps", "batch", "GFLOP a sample", "PFLOP", "reads", "GB read", "checkpoints", "GB written"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for each in work:
        size = measured.sample_bytes.get(each.stage.mixture[0].data)
        table.add_row(
            each.stage.name,
            f"{each.stage.steps:,}",
            str(each.stage.global_batch),
            f"{each.gflop_sample:,.0f}",
            f"{each.gflop / 1e6:,.0f}",
            f"{each.reads:,}",
            "?" if size is None else f"{each.reads * size / 1e9:,.0f}",
            f"{each.checkpoints:,}",
            f"{each.checkpoints * measured.checkpoint_bytes / 1e9:,.1f}",
        )
    console.print(table)
    console.print(
        f"parameters {measured.parameter_bytes / 1e6:.1f} MB, checkpoint {measured.checkpoint_bytes / 1e6:.1f} MB; "
        "bytes a sample: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in measured.sample_bytes.items())
    )


def show_runs(counts: Iterable[int], work: Sequence[StageWork], machine: Machine, measured: Measured) -> None:
    table = Table(title="One curriculum, one run")
    headings = (
        "GPUs",
        "at work",
        "hours",
        "speed-up",
        "efficiency",
        "all-reduce",
        "samples/s",
        "cores/GPU",
        "GPU cost, $",
    )
    for name in headings:
        table.add_column(name, justify="right")
    alone = run_on(1, work, machine, measured)
    for gpus in counts:
        outcome = run_on(gpus, work, machine, measured)
        table.add_row(
            f"{gpus:,}",
            f"{outcome.used:,}",
            f"{outcome.hours:,.1f}",
            f"{alone.hours / outcome.hours:.1f}",
            f"{alone.hours / outcome.hours / gpus:.1%}",
            f"{outcome.meeting:.1%}",
            f"{outcome.samples_per_second:,.0f}",
            f"{outcome.cores_per_gpu:.2f}",
            f"{outcome.dollars:,.0f}",
        )
    console.print(table)


def show_side_by_side(counts: Iterable[int], work: Sequence[StageWork], machine: Machine, measured: Measured) -> None:
    """The way to use many GPUs: many runs on a few GPUs each, as in a sweep."""
    table = Table(title="Many curricula side by side (a sweep), four GPUs a run")
    for name in (
        "GPUs",
        "runs",
        "runs a day",
        "GET/s",
        "of a prefix's limit",
        "GB/s read",
        "checkpoint MB/s",
        "GETs, $ a run",
    ):
        table.add_column(name, justify="right")
    one = run_on(4, work, machine, measured)
    reads = sum(each.reads for each in work)
    written = sum(each.checkpoints for each in work) * measured.checkpoint_bytes
    for gpus in counts:
        runs = gpus // 4
        if not runs:
            continue
        rate = runs * one.samples_per_second
        table.add_row(
            f"{gpus:,}",
            f"{runs:,}",
            f"{runs * 24 / one.hours:,.1f}",
            f"{rate:,.0f}",
            f"{rate / PUBLISHED.gets_per_second_and_prefix:.0%}",
            f"{runs * one.bytes_per_second / 1e9:.2f}",
            f"{runs * written / one.hours / 3600 / 1e6:.2f}",
            f"{reads / 1000 * PUBLISHED.dollars_per_1000_gets:.2f}",
        )
    console.print(table)
    puts = sum(each.checkpoints * math.ceil(measured.checkpoint_bytes / UPLOAD_PART_BYTES) for each in work)
    console.print(
        f"a run's checkpoints: {puts:,} PUTs, ${puts / 1000 * PUBLISHED.dollars_per_1000_puts:.2f}; two are kept: "
        f"{2 * measured.checkpoint_bytes / 1e9:.2f} GB a stage, "
        f"${2 * measured.checkpoint_bytes / 1e9 * PUBLISHED.dollars_per_gb_month:.4f} a month"
    )


# ------------------------------------------------------------------------------------------------- the order, simulated


def simulate(shards: int, per_shard: int) -> None:
    """Time manifest and order at `shards` shards, with the code that training runs."""
    table = Table(title=f"{shards:,} shards of {per_shard} samples: {shards * per_shard:,} samples")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("size", justify="right")
    clock = time.perf_counter

    began, before = clock(), _resident()
    manifest = Manifest("chairs", tuple(_shard(number, per_shard) for number in range(shards)))
    table.add_row("build the manifest", f"{clock() - began:.1f}", f"{(_resident() - before) / 2**20:,.0f} MiB resident")
    with tempfile.TemporaryDirectory() as folder:
        began = clock()
        url = manifest.publish(open_store(folder))
        size = next(Path(folder).glob("*.json")).stat().st_size
        table.add_row("publish it", f"{clock() - began:.1f}", f"{size / 2**20:,.0f} MiB on storage")
        del manifest
        began, before = clock(), _resident()
        manifest = Manifest.load(url)
        table.add_row("load it, as every worker does", f"{clock() - began:.1f}", f"{_peak() / 2**20:,.0f} MiB peak")
    began = clock()
    selection = manifest.select("train")
    table.add_row("select a subset", f"{clock() - began:.1f}", f"{selection.nbytes / 2**20:,.0f} MiB")
    began = clock()
    for index in range(0, len(selection), max(1, len(selection) // 10_000)):
        manifest.place(int(selection[index]))
    table.add_row("find 10,000 samples' shards", f"{clock() - began:.2f}", "")

    order = Order(sizes=(len(selection),), repeats=(1,), seed=1)
    world, batch = 1000, 8000
    began = clock()
    _, chosen = order.locate(range(batch))
    table.add_row(f"plan a step of {batch:,} samples, all ranks", f"{clock() - began:.3f}", "")
    began = clock()
    for rank in range(world):
        order.locate(rank_positions(7, batch, rank, world))
    table.add_row(f"plan a step, one of {world:,} ranks", f"{(clock() - began) / world:.6f}", "")
    began = clock()
    _, epoch = order.locate(range(order.epoch_length))
    table.add_row("plan a whole epoch", f"{clock() - began:.1f}", f"{epoch.nbytes / 2**20:,.0f} MiB")
    console.print(table)
    if len(np.unique(epoch)) != order.epoch_length:
        raise RuntimeError("an epoch does not hold every sample once")
    hits = np.bincount(chosen // per_shard, minlength=shards)
    console.print(
        f"a step of {batch:,} reads touches {np.count_nonzero(hits):,} shards, the busiest {hits.max()} times; "
        f"an epoch holds every sample once (checked)"
    )


def _shard(number: int, samples: int) -> ShardEntry:
    """A shard like those of FlyingChairs: 0.42 MiB per sample."""
    entries = tuple(
        SampleEntry(f"train_{number * samples + i:09d}", "train", 440_320 * i, 440_320, 123_456_789, 384, 512, 0)
        for i in range(samples)
    )
    return ShardEntry(f"shards/chairs-{number:07d}-0123456789abcdef.tar", 440_320 * samples, f"{number:064x}", entries)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parts = ("paper", "manifest")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, help="one of the two parts")
    parser.add_argument(
        "--variant", choices=sorted(VARIANTS), default="refine", help="whose work counts; speeds are those of refine"
    )
    parser.add_argument("--precision", choices=tuple(SPEEDS), default="fp32", help="whose speed counts")
    parser.add_argument("--gpus", type=_counts, default="1,2,4,8,16,64,256,1000", help="(default: %(default)s)")
    parser.add_argument("--shards", type=positive, default=10**6, help="of the simulated manifest (%(default)s)")
    parser.add_argument("--per-shard", type=positive, default=1, help="samples of each (%(default)s)")
    arguments = parser.parse_args()
    if arguments.only != "manifest":
        config = _recipe(arguments.variant)
        parameter_bytes, checkpoint_bytes = measure_model(config)
        measured = Measured(parameter_bytes, checkpoint_bytes, measure_samples())
        if not measured.sample_bytes:
            print("GMFLOW_SAMPLES is not set: no bytes a sample", file=sys.stderr)
        work = [StageWork.of(config, stage) for stage in config.stages]
        machine = Machine(SPEEDS[arguments.precision])
        counts = arguments.gpus
        console.print(
            f"{arguments.variant}, {arguments.precision}: {1000 * machine.speed.fixed_s:.1f} ms a pass and "
            f"{machine.speed.tflops:.1f} TFLOP/s"
        )
        show_work(work, measured)
        show_runs(counts, work, machine, measured)
        larger = [_larger_batch(each, 8) for each in work]
        console.print("With batches eight times as large and as many fewer steps (another recipe, accuracy unknown):")
        show_runs(counts, larger, machine, measured)
        show_side_by_side(counts, work, machine, measured)
    if arguments.only != "paper":
        simulate(arguments.shards, arguments.per_shard)


def _counts(text: str) -> list[int]:
    return [positive(count) for count in text.split(",")]


def _recipe(variant: str) -> CurriculumConfig:
    path = Path(__file__).parents[1] / "pipelines" / "configs" / f"curriculum_{variant}.yaml"
    return load_config(CurriculumConfig, str(path), [f"data.{name}=URL" for name in EXPECTED_COUNTS])


def _larger_batch(work: StageWork, times: int) -> StageWork:
    stage = work.stage
    larger = stage.model_copy(update={"global_batch": stage.global_batch * times, "steps": stage.steps // times})
    return dataclasses.replace(work, stage=larger)


if __name__ == "__main__":
    main()
