"""Measure the data plane: encodings of frames and flow, samples per second, storage, writing, planning.

    python -m benchmarks.data                                    # all; writing takes longest, `--only` leaves it out
    python -m benchmarks.data --only codes,loading --rounds 7

Real samples are found as in the tests, through GMFLOW_SAMPLES and GMFLOW_FORMAT_SAMPLES. What is compared takes turns,
round by round, and each figure is the median of its rounds, so that ratios are meaningful even on a shared machine. A
process computes on one core: OpenCV, zstd and torch use no threads of their own.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator

import cv2
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.data.codes import compare_codes
from benchmarks.data.loading import compare_loading
from benchmarks.data.planning import time_planning
from benchmarks.data.raw import VARIABLES, real_samples
from benchmarks.data.s3 import compare_s3
from benchmarks.data.stored import compare_stored
from benchmarks.data.writing import compare_writing
from datasets_etl.etl import run_etl
from datasets_etl.manifest import Manifest
from pipelines.arguments import positive
from pipelines.cluster import connected

PARTS = ("codes", "loading", "stored", "s3", "writing", "planning")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description="Measure the data plane on real samples."
    )
    parser.add_argument("--only", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument("--rounds", type=positive, default=3, help="median of so many (default: %(default)s)")
    arguments = parser.parse_args()
    parts = set(arguments.only.split(","))
    if unknown := parts - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if missing := [name for name in VARIABLES if name not in os.environ and parts != {"planning"}]:
        parser.error(f"{missing[0]} is not set: it names a folder of samples")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    console = Console(width=130)
    for table in measurements(parts, arguments.rounds):
        console.print(table)


def measurements(parts: set[str], rounds: int) -> Iterator[Table]:
    raws = [] if parts == {"planning"} else real_samples()
    if "codes" in parts:
        yield from compare_codes(raws, rounds)
    if "planning" in parts:
        yield time_planning(rounds)
    if parts <= {"codes", "planning"}:
        return
    with tempfile.TemporaryDirectory() as folder:
        with connected(2):
            manifests = {raw.name: Manifest.load(run_etl(raw.name, str(raw.root), folder).manifest_url) for raw in raws}
            if "writing" in parts:
                yield compare_writing(raws[0], rounds)
        if "stored" in parts:
            yield compare_stored(raws, manifests)
        if "loading" in parts:
            yield compare_loading(raws, rounds, manifests)
        if "s3" in parts:
            yield compare_s3(manifests["chairs"], rounds)


if __name__ == "__main__":
    main()
