"""Time manifest and order at many shards, with the code that training runs."""

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.table import Table

from datasets_etl.manifest import Manifest, SampleEntry, ShardEntry
from datasets_etl.order import Order, rank_positions
from datasets_etl.storage import open_store


def simulate(shards: int, per_shard: int) -> Iterator[Table | str]:
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
        began = clock()
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
    yield table
    if len(np.unique(epoch)) != order.epoch_length:
        raise RuntimeError("an epoch does not hold every sample once")
    hits = np.bincount(chosen // per_shard, minlength=shards)
    yield (
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
