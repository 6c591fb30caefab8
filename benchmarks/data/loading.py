"""Compare the loader with the usual way: samples decoded, augmented and collated per second on one core."""

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial

from rich.table import Table

from benchmarks.data.naive import naive_sample
from benchmarks.data.raw import Raw
from benchmarks.data.rounds import taking_turns
from datasets_etl.augment import AugmentConfig, augment
from datasets_etl.batches import collate, to_tensors
from datasets_etl.manifest import Manifest
from datasets_etl.order import sample_generator
from datasets_etl.reading import read_sample
from datasets_etl.sources import SampleRef, SourceTree

# Crops and scales of the paper's recipes, samples per second of the reference loader, and the multiple to reach.
RECIPES = {
    "chairs": (AugmentConfig((384, 512), -0.1, 1.0), 37.8, 3.0),
    "sintel": (AugmentConfig((320, 896), -0.2, 0.6), 14.1, 2.5),
    "kitti": (AugmentConfig((320, 1152), -0.2, 0.4, vflip=0.0), 12.0, 2.0),
}
BATCH = 4
_LOADED = 3 * BATCH  # samples per round


def compare_loading(raws: Sequence[Raw], rounds: int, manifests: Mapping[str, Manifest]) -> Table:
    table = Table(title="Decode + augment + collate on one core, samples a second")
    for name in ("dataset, crop", "naive", "ours", "ours / naive", "to reach", "ms: decode", "augment", "collate"):
        table.add_column(name, justify="left" if name.startswith("dataset") else "right")
    for raw in raws:
        if raw.name in RECIPES:
            table.add_row(*_measured(raw, manifests[raw.name], rounds))
    return table


def _measured(raw: Raw, manifest: Manifest, rounds: int) -> list[str]:
    config, reference, factor = RECIPES[raw.name]
    stages = _Stages(manifest, config)
    spent = taking_turns({"naive": partial(_load_naively, raw.tree, raw.refs, config), "ours": stages}, rounds)
    rates = {name: _LOADED / each for name, each in spent.items()}
    return [
        f"{raw.name} {config.crop[1]}x{config.crop[0]}",
        f"{rates['naive']:.1f}",
        f"{rates['ours']:.1f}",
        f"{rates['ours'] / rates['naive']:.2f}",
        f"{factor:g} x {reference} = {factor * reference:.0f}",
        *(f"{1e3 * statistics.median(each[1:]):.1f}" for each in stages.seconds),  # without the warm-up
    ]


def _load_naively(tree: SourceTree, refs: Sequence[SampleRef], config: AugmentConfig) -> None:
    for first in range(0, _LOADED, BATCH):
        positions = range(first, first + BATCH)
        samples = [naive_sample(tree, refs[p % len(refs)], config, sample_generator(1, p)) for p in positions]
        collate([to_tensors(sample) for sample in samples])


class _Stages:
    """Reads, augments and collates samples when called, and records the seconds per sample of each stage."""

    def __init__(self, manifest: Manifest, config: AugmentConfig) -> None:
        self.manifest, self.config = manifest, config
        self.seconds: tuple[list[float], list[float], list[float]] = ([], [], [])

    def __call__(self) -> None:
        clock = time.perf_counter
        spent = [0.0, 0.0, 0.0]
        for first in range(0, _LOADED, BATCH):
            batch = []
            for position in range(first, first + BATCH):
                times = [clock()]
                sample = read_sample(self.manifest, position % len(self.manifest.samples), occlusion=False)
                times.append(clock())
                batch.append(augment(sample, self.config, sample_generator(1, position)))
                times.append(clock())
                spent[0] += times[1] - times[0]
                spent[1] += times[2] - times[1]
            began = clock()
            collate([to_tensors(sample) for sample in batch])
            spent[2] += clock() - began
        for stage, each in zip(self.seconds, spent, strict=True):
            stage.append(each / _LOADED)
