"""Shard a raw dataset, and look back at what was written.

python pipelines/etl.py --dataset sintel --source DIR --target URL      # the last line on stdout: the manifest's URL
python pipelines/etl.py --dataset mine --list pairs.csv --source DIR --target URL                   # any other dataset
python pipelines/etl.py verify MANIFEST                                 # read everything back
python pipelines/etl.py inspect MANIFEST --output sheet.png             # counts, motion, a few pictures
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# First: see pipelines/__init__.py.
from pipelines.arguments import Parser, positive

# isort: split
from rich.console import Console
from rich.table import Table
from rich.text import Text

from datasets_etl.errors import DataError
from datasets_etl.etl import DEFAULT_SHARD_BYTES, EtlResult, run_etl
from datasets_etl.formats import encode_frame_png
from datasets_etl.inspection import MOTION_EDGES, motion_histogram, spread, verify_manifest
from datasets_etl.manifest import Manifest
from datasets_etl.reading import read_sample
from datasets_etl.sources import EXPECTED_COUNTS, SOURCES, Source, chairs, listed
from datasets_etl.sources.layout import decoded_text
from datasets_etl.storage import split_url
from pipelines.cluster import connected
from pipelines.contact_sheet import contact_sheet
from pipelines.errors import resumable_command
from pipelines.lasting import lasting_object, lasting_store
from pipelines.progress import Progress, print_line
from pipelines.wording import counted

# Progress and reports go to stderr, because stdout is for output that scripts read.
console = Console(stderr=True)

_DATASET = re.compile(r"[\w-]+", re.ASCII)  # it becomes part of URLs, and of metrics' names
_REPORTED = 20  # damaged pairs listed; the manifest has them all


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parsers = {"verify": _verify_parser, "inspect": _inspect_parser}
    if argv and argv[0] in parsers:
        arguments = parsers[argv[0]]().parse_args(argv[1:])
        arguments.task = argv[0]
        return arguments
    parser = _shard_parser()
    arguments = parser.parse_args(argv)
    arguments.task = "shard"
    _check_dataset(parser, arguments)
    return arguments


def _check_dataset(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    name = arguments.dataset
    if name != "chairs" and (arguments.split_list or arguments.split_by_hash):
        parser.error("--split-list and --split-by-hash are for --dataset chairs; the others' subsets are their folders")
    if arguments.list is None and name not in SOURCES:
        known = ", ".join(sorted(SOURCES))
        parser.error(f"--dataset {name}: there is {known}; of any other dataset give the pairs by --list")
    if arguments.list is not None and name in SOURCES:
        parser.error(f"--dataset {name}: its layout is known; give a dataset that you --list another name")
    if not _DATASET.fullmatch(name):
        parser.error(f"--dataset {name}: letters, digits, _ and - make a name")


def _shard_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Shard a raw optical-flow dataset into WebDataset tars by Ray tasks.",
        epilog="etl.py verify MANIFEST reads a written dataset back; etl.py inspect MANIFEST shows what is in it.",
    )
    parser.add_argument(
        "--dataset", required=True, help=f"{', '.join(sorted(SOURCES))}; or a name for one of your own, with --list"
    )
    parser.add_argument(
        "--list", metavar="CSV|URL", help="of a dataset of your own: columns subset, image0, image1, flow"
    )
    parser.add_argument("--source", required=True, help="the unpacked dataset: a folder, file:// or s3:// URL")
    parser.add_argument("--target", required=True, help="where shards and manifest go: a folder, file:// or s3:// URL")
    parser.add_argument("--workers", type=positive, help="shards written at a time (default: the cluster's CPUs)")
    parser.add_argument(
        "--shard-mib",
        type=positive,
        default=DEFAULT_SHARD_BYTES // 2**20,
        help="raw MiB of pixels and flow in a shard (default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="a damaged pair stops the run instead of being left out")
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--split-list", metavar="PATH|URL", help="chairs: the official train/val list, if it is elsewhere"
    )
    split.add_argument(
        "--split-by-hash", action="store_true", help="chairs: for want of the list, split by number's hash"
    )
    parser.add_argument("--verbose", action="store_true", help="show the output of Ray's workers too")
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="etl.py verify",
        description="Read a dataset back by Ray tasks: sizes, SHA-256 and checksums, and that every sample decodes.",
    )
    parser.add_argument("manifest", help="URL or path of a manifest")
    parser.add_argument("--workers", type=positive, help="shards read at a time (default: the cluster's CPUs)")
    parser.add_argument("--verbose", action="store_true", help="show the output of Ray's workers too")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="etl.py inspect",
        description="Show what is in a dataset: counts, sizes, motion, and pictures of a few pairs.",
    )
    parser.add_argument("manifest", help="URL or path of a manifest")
    parser.add_argument("--output", metavar="PNG", help="where the pictures go (default: DATASET-VERSION.png here)")
    parser.add_argument(
        "--pairs",
        type=positive,
        default=64,
        help="pairs of each subset the histogram is made of (default: %(default)s)",
    )
    parser.add_argument("--rows", type=positive, default=3, help="pairs of each subset shown (default: %(default)s)")
    return parser


@contextmanager
def _progress(dataset: str, doing: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, or lines, with rate and time left, as a function of (done, total)."""
    with Progress(console) as progress:
        yield progress.task(f"{dataset}: {doing}", at_first=f"{dataset}: indexing").show


def shard_dataset(
    dataset: str,
    source: str,
    target: str,
    workers: int | None,
    shard_bytes: int,
    *,
    strict: bool = False,
    index: Source | None = None,
) -> EtlResult:
    """`run_etl` with a progress bar, or with lines of text if stderr is no terminal. Needs a connected Ray."""
    if not console.is_terminal:
        print_line(console, f"{dataset}: listing {source} and reading the files' sizes")
    with _progress(dataset, "writing shards") as show:
        return run_etl(
            dataset,
            source,
            target,
            workers=workers,
            shard_bytes=shard_bytes,
            strict=strict,
            index=index,
            on_progress=show,
        )


def chosen_index(arguments: argparse.Namespace) -> Source | None:
    """What lists the pairs: a list, or another split of chairs; None for the dataset's own layout.

    Raises DataError if a given list does not exist.
    """
    if arguments.list is not None:
        text = _read_text(arguments.list)
        return functools.partial(listed.index, dataset=arguments.dataset, text=text, where=arguments.list)
    if arguments.split_by_hash:
        return chairs.index_by_hash
    if arguments.split_list is not None:
        return functools.partial(chairs.index, split_list=_read_text(arguments.split_list))
    return None


def _read_text(place: str) -> str:
    store, name = split_url(place)
    return decoded_text(store.read(name))


def show_summary(dataset: str, result: EtlResult) -> None:
    table = Table(title=f"{dataset}: {counted(result.shards, 'shard')} ({result.reused} from an earlier run)")
    table.add_column("subset")
    table.add_column("pairs", justify="right")
    table.add_column("whole dataset", justify="right")
    for subset, count in result.subsets.items():
        whole = EXPECTED_COUNTS.get(dataset, {}).get(subset)
        table.add_row(
            subset, f"{count:,}", "" if whole in (None, count) else f"[yellow]{whole:,}: not complete[/yellow]"
        )
    console.print(table)
    ratio = result.stored_bytes / result.raw_bytes
    console.print(
        f"{result.raw_bytes / 2**20:,.1f} MiB raw → {result.stored_bytes / 2**20:,.1f} MiB stored ({ratio:.2f}); "
        f"{result.invalid_pixels:,} pixels without valid flow"
    )

    show_quarantined(result.quarantined)


def show_quarantined(quarantined: Mapping[str, str]) -> None:
    if not quarantined:
        return
    table = Table(title=f"[red]{counted(len(quarantined), 'damaged pair')} left out[/red]", show_lines=False)
    table.add_column("pair", overflow="fold")
    table.add_column("why", overflow="fold")
    for key in sorted(quarantined)[:_REPORTED]:
        table.add_row(Text(key), Text(quarantined[key]))
    if len(quarantined) > _REPORTED:
        table.add_row("…", f"{len(quarantined) - _REPORTED:,} more, all in the manifest")
    console.print(table)


def verify(arguments: argparse.Namespace) -> None:
    manifest = Manifest.load(arguments.manifest)
    with connected(arguments.workers, verbose=arguments.verbose), _progress(manifest.dataset, "verifying") as show:
        damages = verify_manifest(manifest, workers=arguments.workers, on_progress=show)
    for damage in damages[:_REPORTED]:
        print(f"{damage.shard}: {damage.problem}", file=sys.stderr)
    if damages:
        shards = list(dict.fromkeys(damage.shard for damage in damages))
        raise DataError(
            f"{arguments.manifest}: {len(shards)} of {counted(len(manifest.shards), 'shard')} damaged, {shards[0]} "
            f"among them ({damages[0].problem}); delete them and run pipelines/etl.py again, it writes what is missing"
        )
    stored = sum(shard.bytes for shard in manifest.shards) / 2**20
    held = f"{counted(len(manifest.samples), 'pair')} in {counted(len(manifest.shards), 'shard')}"
    print(f"whole: {held}, {stored:,.1f} MiB read")


def inspect(arguments: argparse.Namespace) -> None:
    manifest = Manifest.load(arguments.manifest)
    output = Console(soft_wrap=True)
    output.print(_subset_table(manifest))
    store, name = lasting_object(arguments.output or f"{manifest.dataset}-{manifest.version}.png", "--output")
    numbers = {
        subset: [i for i, sample in enumerate(manifest.samples) if sample.subset == subset]
        for subset in manifest.subsets
    }
    output.print(_motion_table(manifest, {subset: spread(all_, arguments.pairs) for subset, all_ in numbers.items()}))
    show_quarantined(manifest.quarantined)
    shown = [number for all_ in numbers.values() for number in spread(all_, arguments.rows)]
    store.write(name, encode_frame_png(contact_sheet(read_sample(manifest, number) for number in shown)))
    print(f"{store.url}/{name}")


def _subset_table(manifest: Manifest) -> Table:
    table = Table(title=f"{manifest.dataset} {manifest.version}: {counted(len(manifest.shards), 'shard')}")
    for name in ("subset", "pairs", "frames: pairs", "without truth", "MiB", "MiB/pair"):
        table.add_column(name, justify="left" if name == "subset" else "right")
    for subset, count in manifest.subsets.items():
        samples = [sample for sample in manifest.samples if sample.subset == subset]
        sizes: dict[str, int] = {}
        for sample in samples:
            size = f"{sample.width}x{sample.height}"
            sizes[size] = sizes.get(size, 0) + 1
        pixels = sum(s.width * s.height for s in samples if s.invalid_pixels is not None)
        invalid = sum(s.invalid_pixels or 0 for s in samples)
        stored = sum(sample.length for sample in samples) / 2**20
        table.add_row(
            subset,
            f"{count:,}",
            ", ".join(f"{size}: {number:,}" for size, number in sorted(sizes.items())),
            f"{invalid:,} ({invalid / pixels:.1%})" if pixels else "all",
            f"{stored:,.1f}",
            f"{stored / count:.2f}",
        )
    return table


def _motion_table(manifest: Manifest, chosen: Mapping[str, list[int]]) -> Table:
    counts = {
        subset: motion_histogram(read_sample(manifest, number) for number in numbers)
        for subset, numbers in chosen.items()
    }
    read = sum(len(numbers) for numbers in chosen.values())
    table = Table(title=f"motion: share of the valid pixels of {read:,} of {len(manifest.samples):,} pairs")
    table.add_column("pixels a frame", justify="right")
    for subset in counts:
        table.add_column(subset)
    for number, low in enumerate(MOTION_EDGES):
        last = number + 1 == len(MOTION_EDGES)
        shares = [found[number] / max(found.sum(), 1) for found in counts.values()]
        table.add_row(
            f"{low:g} and more" if last else f"{low:g} to {MOTION_EDGES[number + 1]:g}",
            *(f"{share:6.1%} {'█' * round(20 * share)}" for share in shares),
        )
    return table


def shard(arguments: argparse.Namespace) -> None:
    index = chosen_index(arguments)
    target = lasting_store(arguments.target, "--target")
    with connected(arguments.workers, verbose=arguments.verbose):
        result = shard_dataset(
            arguments.dataset,
            arguments.source,
            target.url,
            arguments.workers,
            arguments.shard_mib * 2**20,
            strict=arguments.strict,
            index=index,
        )
    show_summary(arguments.dataset, result)
    print(result.manifest_url)


@resumable_command
def main() -> None:
    arguments = parse_arguments()
    {"shard": shard, "verify": verify, "inspect": inspect}[arguments.task](arguments)


if __name__ == "__main__":
    main()
