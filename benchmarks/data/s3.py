"""Compare the training stream from a folder with that from a real S3 server."""

import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
from rich.table import Table

from benchmarks.data.loading import BATCH, RECIPES
from benchmarks.data.rounds import seconds
from datasets_etl.loader import MixturePart, PositionDataset, TrainingStream
from datasets_etl.manifest import Manifest
from datasets_etl.storage import open_store
from tests.seaweedfs import running


def compare_s3(manifest: Manifest, rounds: int) -> Table:
    """Compare the same stream with one loader process from a folder and from an S3 server on this machine."""
    cores = sorted(os.sched_getaffinity(0))
    table = Table(title="The stream with one loader process that reads ahead, samples a second")
    for heading in ("", "folder", "S3", "S3 / folder", "to reach"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as folder, running(Path(folder)) as server:
        os.environ.update(server.settings)
        remote = open_store("s3://data/bench")
        for shard in manifest.shards:
            remote.write(shard.name, manifest.store().read(shard.name))
        name = manifest.url.rpartition("/")[2]
        remote.write(name, manifest.to_bytes())
        streams = {
            "folder": _warm_stream(manifest),
            "S3": _warm_stream(Manifest.load(f"{remote.url}/{name}")),
        }
        places = {"loader on a core, server and consumer on the others": cores[:1], "all on all cores": cores}
        for how, loaders in places.items():
            _place(loaders, [core for core in cores if core not in loaders] or cores)
            rates = _rates(streams, rounds)
            ratio = rates["S3"] / rates["folder"]
            table.add_row(how, f"{rates['folder']:.1f}", f"{rates['S3']:.1f}", f"{ratio:.2f}", "0.9")
    return table


def _place(loaders: Sequence[int], others: Sequence[int]) -> None:
    """Pin this process's loader processes to some cores, and itself and all its other children (servers) to others."""
    loading = {process.pid for process in multiprocessing.active_children()}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, loaders if process.pid in loading else others)


def _rates(streams: dict[str, Iterator[object]], rounds: int) -> dict[str, float]:
    made_before, steps = 5, 30

    def draw(stream: Iterator[object], count: int) -> None:
        for _ in range(count):
            next(stream)

    times: dict[str, list[float]] = {place: [] for place in streams}
    for number in range(rounds + 1):
        for place, stream in streams.items():
            draw(stream, made_before)  # these were loaded while the others had their turn
            spent = seconds(partial(draw, stream, steps))
            if number:
                times[place].append(spent)
    return {place: steps * BATCH / statistics.median(spent) for place, spent in times.items()}


def _warm_stream(manifest: Manifest) -> Iterator[object]:
    dataset = PositionDataset([MixturePart(manifest, None, 1, RECIPES["chairs"][0])], seed=1)
    stream = TrainingStream(
        dataset, range(10**6), global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, workers=1
    )

    def batches() -> Iterator[object]:
        for _, micro_batches in stream:
            yield from micro_batches

    warm = batches()
    next(warm)
    return warm
