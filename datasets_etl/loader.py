"""Samples for training and evaluation, straight from shards on storage.

`TrainingStream` is the run's data stream cut into one rank's micro-batches; its whole state is the step to begin with.
`read_sample` and `EvaluationSet` give samples as they are stored.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets_etl.augment import AugmentConfig, augment
from datasets_etl.cache import SampleCache
from datasets_etl.manifest import Manifest
from datasets_etl.order import Order, rank_positions, sample_generator
from datasets_etl.samples import FlowSample, decode_sample
from datasets_etl.shards import read_sample_bytes

# Requests a process has under way: enough to hide a bucket's latency behind decoding.
_READS_AHEAD = 4


class FlowBatch(NamedTuple):
    """Samples as tensors; without the leading B for a single one.

    Attributes:
        image0, image1: uint8 [B, 3, H, W], RGB.
        flow: float32 [B, 2, H, W], pixels; 0 where not valid.
        valid: bool [B, H, W].
    """

    image0: torch.Tensor
    image1: torch.Tensor
    flow: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class MixturePart:
    """A subset of one dataset as a part of a mixture: how often an epoch holds it and how it is augmented."""

    manifest: Manifest
    subset: str | None
    repeats: int
    augmentation: AugmentConfig


def read_sample(manifest: Manifest, index: int, *, occlusion: bool = True) -> FlowSample:
    """Sample number `index` of a manifest, by one ranged read, with or without its occlusion mask.

    Raises DataError naming shard and sample.
    """
    return _decoded(_read_stored(manifest, index), occlusion=occlusion)


def _read_stored(manifest: Manifest, index: int, cache: SampleCache | None = None) -> tuple[bytes, str]:
    """A sample's bytes, and what to call it in an error."""
    shard, entry = manifest.place(index)
    store = manifest.store()
    fetch = functools.partial(read_sample_bytes, store, shard, entry)
    data = fetch() if cache is None else cache.read(shard, entry, fetch)
    return data, f"{store.url}/{shard.name}: sample {entry.key}"


def _decoded(stored: tuple[bytes, str], *, occlusion: bool) -> FlowSample:
    data, where = stored
    return decode_sample(data, where, occlusion=occlusion)


@functools.lru_cache(maxsize=1)
def _reading_threads(pid: int) -> ThreadPoolExecutor:
    """Those of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=_READS_AHEAD, thread_name_prefix="gmflow-read")


class EvaluationSet(Dataset[FlowSample]):
    """The samples of one subset in order, whole and as they are."""

    def __init__(self, manifest: Manifest, subset: str | None, limit: int | None = None) -> None:
        self.manifest = manifest
        self.subset = subset
        self.indices = manifest.select(subset)[:limit]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> FlowSample:
        return read_sample(self.manifest, int(self.indices[number]))


class PositionDataset(Dataset[FlowBatch]):
    """Map-style: the n-th augmented sample of a run, a pure function of (mixture, seed, position).

    Args:
        mixture: what an epoch holds.
        seed: of order and augmentation.
        cache: keeps stored samples on this machine; None reads them from storage each time.
    """

    def __init__(self, mixture: Sequence[MixturePart], seed: int, cache: SampleCache | None = None) -> None:
        self.mixture = tuple(mixture)
        self._read = functools.partial(_read_stored, cache=cache)
        self.seed = seed
        self.selections = [part.manifest.select(part.subset) for part in mixture]
        self.order = Order(
            sizes=tuple(len(selection) for selection in self.selections),
            repeats=tuple(part.repeats for part in mixture),
            seed=seed,
        )

    def __getitem__(self, position: int) -> FlowBatch:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[FlowBatch]:
        """Several at once, as a DataLoader asks for a batch: the next ones are read while one is decoded."""
        parts, indices = self.order.locate(positions)
        chosen = [self.mixture[part] for part in parts]
        numbers = [int(self.selections[part][index]) for part, index in zip(parts, indices, strict=True)]
        stored = _reading_threads(os.getpid()).map(self._read, [part.manifest for part in chosen], numbers)
        return [
            to_tensors(
                augment(_decoded(read, occlusion=False), part.augmentation, sample_generator(self.seed, position))
            )
            for position, part, read in zip(positions, chosen, stored, strict=True)
        ]


class _MicroBatches(Sampler[list[int]]):
    """Positions of one rank's micro-batches, step after step."""

    def __init__(self, steps: range, global_batch: int, micro_batch: int, rank: int, world_size: int) -> None:
        self.steps = steps
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield from self.of_step(step)

    def of_step(self, step: int) -> list[list[int]]:
        mine = list(rank_positions(step, self.global_batch, self.rank, self.world_size))
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]


class TrainingStream:
    """One rank's share of the stream: for every step the micro-batches to accumulate.

    Args:
        dataset: the run's samples by position.
        steps: the steps to yield, from the one to resume at.
        global_batch: samples of a step over all ranks; the same whatever the number of ranks.
        micro_batch: samples a rank computes at a time.
        rank, world_size: of this process.
        workers: loader processes; 0 loads in this one.
    """

    def __init__(
        self,
        dataset: PositionDataset,
        steps: range,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        workers: int = 0,
    ) -> None:
        self.steps = steps
        self._batches = _MicroBatches(steps, global_batch, micro_batch, rank, world_size)
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._batches,
            collate_fn=collate,
            num_workers=workers,
            # A fork of a process that already runs threads (Ray's, OpenMP's) can deadlock.
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_one_thread,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the loader draws a seed for its processes: not from the global generator
        )

    def __iter__(self) -> Iterator[tuple[int, Iterator[FlowBatch]]]:
        """(step, its micro-batches); the micro-batches must be drawn before the next step."""
        batches = iter(self._loader)
        for step in self.steps:
            count = len(self._batches.of_step(step))
            yield step, (next(batches) for _ in range(count))


def to_tensors(sample: FlowSample) -> FlowBatch:
    """Channels first; a sample without ground truth is a ValueError."""
    if sample.flow is None or sample.valid is None:
        raise ValueError(f"{sample.key} has no ground truth to train on")
    return FlowBatch(
        image0=_channels_first(sample.image0),  # [3, H, W]
        image1=_channels_first(sample.image1),
        flow=_channels_first(sample.flow),  # [2, H, W]
        valid=torch.from_numpy(sample.valid),  # [H, W]
    )


def _channels_first(pixels: npt.NDArray[Any]) -> torch.Tensor:
    """[H, W, C] → [C, H, W]; several times as fast as a transposed copy."""
    planes = np.empty((pixels.shape[2], *pixels.shape[:2]), pixels.dtype)
    for channel, plane in enumerate(planes):
        cv2.extractChannel(pixels, channel, dst=plane)
    return torch.from_numpy(planes)


def collate(samples: Sequence[FlowBatch]) -> FlowBatch:
    """Stack samples of one size into a batch."""
    return FlowBatch(*(torch.stack(tensors) for tensors in zip(*samples, strict=True)))


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
