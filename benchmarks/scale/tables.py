"""The estimates as tables and sentences."""

import math
from collections.abc import Iterable, Sequence

from rich.table import Table

from benchmarks.scale.estimate import StageWork, run_on
from benchmarks.scale.machine import Machine
from benchmarks.scale.measuring import Measured
from benchmarks.scale.published import PUBLISHED

UPLOAD_PART_BYTES = 8 * 2**20  # part size of boto3's and pyarrow's multipart uploads


def work_table(work: Sequence[StageWork], measured: Measured) -> Table:
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
    return table


def sizes(measured: Measured) -> str:
    return (
        f"parameters {measured.parameter_bytes / 1e6:.1f} MB, checkpoint {measured.checkpoint_bytes / 1e6:.1f} MB; "
        "bytes a sample: " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in measured.sample_bytes.items())
    )


def runs_table(counts: Iterable[int], work: Sequence[StageWork], machine: Machine, measured: Measured) -> Table:
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
    return table


def side_by_side_table(counts: Iterable[int], work: Sequence[StageWork], machine: Machine, measured: Measured) -> Table:
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
    return table


def checkpoints(work: Sequence[StageWork], measured: Measured) -> str:
    puts = sum(each.checkpoints * math.ceil(measured.checkpoint_bytes / UPLOAD_PART_BYTES) for each in work)
    return (
        f"a run's checkpoints: {puts:,} PUTs, ${puts / 1000 * PUBLISHED.dollars_per_1000_puts:.2f}; two are kept: "
        f"{2 * measured.checkpoint_bytes / 1e9:.2f} GB a stage, "
        f"${2 * measured.checkpoint_bytes / 1e9 * PUBLISHED.dollars_per_gb_month:.4f} a month"
    )
