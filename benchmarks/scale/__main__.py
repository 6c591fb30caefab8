"""Estimate one whole curriculum on 1 to 1,000 GPUs: compute, network, storage, cost, and what limits it first.

    python -m benchmarks.scale                          # everything, about two minutes; real samples by GMFLOW_SAMPLES
    python -m benchmarks.scale --variant base --precision bf16
    python -m benchmarks.scale --only manifest --shards 100000

These figures come from the project's own code: operations of the model (the formulas of `benchmarks.model`), bytes of
its parameters, gradients and checkpoints, bytes per sample in real shards, and order and manifest at 10⁶ shards. The
model's speed was measured on one H100 (`machine.py`). Published figures are in `published.py`.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.model import VARIANTS
from benchmarks.scale.estimate import StageWork
from benchmarks.scale.machine import SPEEDS, Machine
from benchmarks.scale.manifest import simulate
from benchmarks.scale.measuring import measure
from benchmarks.scale.tables import checkpoints, runs_table, side_by_side_table, sizes, work_table
from datasets_etl.sources import EXPECTED_COUNTS
from pipelines.arguments import positive
from pipelines.config_file import load_config
from pipelines.training.config import CurriculumConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("paper", "manifest"), help="one of the two parts")
    parser.add_argument(
        "--variant", choices=sorted(VARIANTS), default="refine", help="whose work counts; speeds are those of refine"
    )
    parser.add_argument("--precision", choices=tuple(SPEEDS), default="fp32", help="whose speed counts")
    parser.add_argument("--gpus", type=_counts, default="1,2,4,8,16,64,256,1000", help="(default: %(default)s)")
    parser.add_argument("--shards", type=positive, default=10**6, help="of the simulated manifest (%(default)s)")
    parser.add_argument("--per-shard", type=positive, default=1, help="samples of each (%(default)s)")
    arguments = parser.parse_args()
    console = Console(width=140)
    if arguments.only != "manifest":
        for shown in paper(arguments.variant, arguments.precision, arguments.gpus):
            console.print(shown)
    if arguments.only != "paper":
        for shown in simulate(arguments.shards, arguments.per_shard):
            console.print(shown)


def _counts(text: str) -> list[int]:
    return [positive(count) for count in text.split(",")]


def paper(variant: str, precision: str, counts: Sequence[int]) -> Iterator[Table | str]:
    """The paper's curriculum on each number of GPUs."""
    path = Path(__file__).parents[2] / "pipelines" / "configs" / f"curriculum_{variant}.yaml"
    config = load_config(CurriculumConfig, str(path), [f"data.{name}=URL" for name in EXPECTED_COUNTS])
    measured = measure(config)
    if not measured.sample_bytes:
        print("GMFLOW_SAMPLES is not set: no bytes a sample", file=sys.stderr)
    work = [StageWork.of(config, stage) for stage in config.stages]
    speed = SPEEDS[precision]
    machine = Machine(speed)
    yield f"{variant}, {precision}: {1000 * speed.fixed_s:.1f} ms a pass and {speed.tflops:.1f} TFLOP/s"
    yield work_table(work, measured)
    yield sizes(measured)
    yield runs_table(counts, work, machine, measured)
    yield "With batches eight times as large and as many fewer steps (another recipe, accuracy unknown):"
    yield runs_table(counts, [each.with_larger_batches(8) for each in work], machine, measured)
    yield side_by_side_table(counts, work, machine, measured)
    yield checkpoints(work, measured)


if __name__ == "__main__":
    main()
