"""Shard a raw dataset: `python pipelines/etl.py --dataset sintel --source DIR --target URL`.

The last line on stdout is the URL of the manifest.
"""

import argparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from datasets_etl.etl import DEFAULT_SHARD_BYTES, EtlResult, run_etl
from datasets_etl.sources import EXPECTED_COUNTS, SOURCES
from pipelines.arguments import positive
from pipelines.cluster import connected
from pipelines.errors import command

# Progress and tables go to stderr: stdout is for what scripts read.
console = Console(stderr=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Shard a raw optical-flow dataset into WebDataset tars by Ray tasks.")
    parser.add_argument("--dataset", required=True, choices=sorted(SOURCES))
    parser.add_argument("--source", required=True, help="the unpacked dataset: a folder, file:// or s3:// URL")
    parser.add_argument("--target", required=True, help="where shards and manifest go: a folder, file:// or s3:// URL")
    parser.add_argument("--workers", type=positive, help="shards written at a time (default: the cluster's CPUs)")
    parser.add_argument(
        "--shard-mib",
        type=positive,
        default=DEFAULT_SHARD_BYTES // 2**20,
        help="raw MiB of pixels and flow in a shard (default: %(default)s)",
    )
    parser.add_argument("--verbose", action="store_true", help="show the output of Ray's workers too")
    return parser.parse_args(argv)


def shard_dataset(dataset: str, source: str, target: str, workers: int | None, shard_bytes: int) -> EtlResult:
    """`run_etl` with a progress bar. Needs a connected Ray."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"{dataset}: indexing", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, description=f"{dataset}: writing shards", completed=done, total=total)

        return run_etl(dataset, source, target, workers=workers, shard_bytes=shard_bytes, on_progress=show)


def show_summary(dataset: str, result: EtlResult) -> None:
    table = Table(title=f"{dataset}: {result.shards} shards ({result.reused} from an earlier run)")
    table.add_column("subset")
    table.add_column("pairs", justify="right")
    table.add_column("whole dataset", justify="right")
    for subset, count in result.subsets.items():
        whole = EXPECTED_COUNTS[dataset].get(subset)
        table.add_row(
            subset, f"{count:,}", "" if whole in (None, count) else f"[yellow]{whole:,}: not complete[/yellow]"
        )
    console.print(table)
    ratio = result.stored_bytes / result.raw_bytes
    console.print(
        f"{result.raw_bytes / 2**20:,.1f} MiB raw → {result.stored_bytes / 2**20:,.1f} MiB stored ({ratio:.2f}); "
        f"{result.invalid_pixels:,} pixels without valid flow"
    )


@command
def main() -> None:
    arguments = parse_arguments()
    with connected(arguments.workers, verbose=arguments.verbose):
        result = shard_dataset(
            arguments.dataset, arguments.source, arguments.target, arguments.workers, arguments.shard_mib * 2**20
        )
    show_summary(arguments.dataset, result)
    print(result.manifest_url)


if __name__ == "__main__":
    main()
