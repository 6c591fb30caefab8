"""Samples for training and evaluation, read directly from shards on storage.

`TrainingStream` yields one rank's micro-batches of the run's data stream; its whole state is the step to begin with.
`read_sample` and `EvaluationSet` return samples as stored, without augmentation.
"""

import copy
import functools
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets_etl.ahead import read_ahead
from datasets_etl.augment import AugmentConfig, augment
from datasets_etl.cache import SampleCache
from datasets_etl.errors import DataError
from datasets_etl.manifest import Manifest, patterns_label
from datasets_etl.order import Order, rank_positions, sample_generator
from datasets_etl.samples import FlowSample, decode_sample
from datasets_etl.shards import read_sample_bytes

# Bytes per pixel of a sample with ground truth: two images, flow and mask.
_PIXEL_BYTES = 3 + 3 + 8 + 1

# Number of samples that a process reads ahead of the one it decodes: enough to hide a bucket's latency.
_READS_AHEAD = 4

# Number of batches that a thread fetches ahead from the loader processes. Each fetch is a handshake, and a step draws
# two batches before it computes.
_BATCHES_AHEAD = 2


class FlowBatch(NamedTuple):
    """Samples as tensors; a single sample has no leading dimension B.

    Attributes:
        image0, image1: uint8 [B, 3, H, W], RGB.
        flow: float32 [B, 2, H, W], pixels; 0 where not valid.
        valid: bool [B, H, W].
    """

    image0: torch.Tensor
    image1: torch.Tensor
    flow: torch.Tensor
    valid: torch.Tensor


class _Packed(NamedTuple):
    """A batch as one tensor: a loader process transfers tensors one by one, which takes a millisecond each.

    Attributes:
        data: uint8, the tensors of a `FlowBatch` one after the other; flow comes first, so that float32 is aligned.
        shape: B, H, W.
    """

    data: torch.Tensor
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class MixturePart:
    """A subset of one dataset as part of a mixture: how often an epoch contains it, and how it is augmented.

    `only` and `without` choose among its samples by name, see `Manifest.select`.
    """

    manifest: Manifest
    subset: str | None
    repeats: int
    augmentation: AugmentConfig
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def indices(self) -> npt.NDArray[np.int64]:
        """Numbers of its samples in the manifest."""
        return self.manifest.select(self.subset, only=self.only, without=self.without)


def read_sample(
    manifest: Manifest, index: int, *, occlusion: bool = True, cache: SampleCache | None = None
) -> FlowSample:
    """Read sample number `index` of a manifest, with or without its occlusion mask.

    This takes one ranged read, unless the sample is cached. Raises DataError with the names of shard and sample.
    """
    return _decoded(_read_stored(manifest, index, cache), occlusion=occlusion)


def _read_stored(manifest: Manifest, index: int, cache: SampleCache | None) -> tuple[bytes, str]:
    """A sample's bytes, and its name for error messages."""
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
    """The reading threads of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=_READS_AHEAD, thread_name_prefix="gmflow-read")


def part_label(only: Sequence[str], without: Sequence[str], limit: int | None) -> str:
    """Which part of a subset is used, for people, such as "only alley_*; first 8 pairs"; empty if it is the whole."""
    first = "" if limit is None else f"first {limit} pairs"
    return "; ".join(filter(None, [patterns_label(only, without), first]))


class EvaluationSet(Dataset[FlowSample]):
    """The samples of one subset in order, in full size and without augmentation.

    Args:
        manifest: the dataset's manifest.
        subset: the subset's name; None: all subsets.
        limit: how many samples to use, from the first on; None: all.
        cache: as for `PositionDataset`.
        only, without: choose among the samples by name, see `Manifest.select`.
    """

    def __init__(
        self,
        manifest: Manifest,
        subset: str | None,
        limit: int | None = None,
        cache: SampleCache | None = None,
        *,
        only: Sequence[str] = (),
        without: Sequence[str] = (),
    ) -> None:
        self.manifest = manifest
        self.subset = subset
        self.part = part_label(only, without, limit)
        self.indices = manifest.select(subset, only=only, without=without)[:limit]
        self._cache = cache

    @classmethod
    def by_subset(
        cls, manifest: Manifest, limit: int | None = None, *, only: Sequence[str] = (), without: Sequence[str] = ()
    ) -> list["EvaluationSet"]:
        """A set for each subset with ground truth of which the patterns leave anything, in the manifest's order.

        A pattern need not match in every one of them.
        """
        every = cls(manifest, None, only=only, without=without)
        every.part = part_label(only, without, limit)
        subsets = np.array([manifest.samples[index].subset for index in every.indices])
        sets = []
        for subset in dict.fromkeys(subsets.tolist()):
            own = copy.copy(every)
            own.subset, own.indices = subset, every.indices[subsets == subset][:limit]
            sets.append(own)
        return sets

    @property
    def is_whole(self) -> bool:
        """Whether it holds every sample of its subset that has ground truth."""
        return len(self.indices) == len(self.manifest.select(self.subset))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> FlowSample:
        return read_sample(self.manifest, int(self.indices[number]), cache=self._cache)


class PositionDataset(Dataset[FlowBatch]):
    """Map-style dataset: the augmented sample at each position of a run, a pure function of (mixture, seed, position).

    Args:
        mixture: the parts of an epoch.
        seed: seed of the order and of the augmentation.
        cache: keeps stored samples on this machine; None: they are read from storage each time.
    """

    def __init__(self, mixture: Sequence[MixturePart], seed: int, cache: SampleCache | None = None) -> None:
        self.mixture = tuple(mixture)
        self._cache = cache
        self.seed = seed
        self.selections = [part.indices() for part in mixture]
        self.order = Order(
            sizes=tuple(len(selection) for selection in self.selections),
            repeats=tuple(part.repeats for part in mixture),
            seed=seed,
        )
        self._reads: dict[int, _Read] = {}  # by position; in progress or done

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_reads": {}}  # another process starts its own reads

    def __getitem__(self, position: int) -> FlowBatch:
        return self.__getitems__(_Draw([position], []))[0]

    def __getitems__(self, draw: "_Draw") -> list[FlowBatch]:
        """Several samples at once, as a DataLoader requests them; upcoming ones are read while these are decoded."""
        self._begin_reading([*draw.positions, *draw.upcoming])
        samples = []
        for position in draw.positions:
            part, stored = self._reads.pop(position)
            sample = _decoded(stored.result(), occlusion=False)
            samples.append(to_tensors(augment(sample, part.augmentation, sample_generator(self.seed, position))))
        return samples

    def _begin_reading(self, positions: Sequence[int]) -> None:
        fresh = [position for position in positions if position not in self._reads]
        for position, number, index in zip(fresh, *self.order.locate(fresh), strict=True):
            part = self.mixture[number]
            sample = int(self.selections[number][index])
            future = _reading_threads(os.getpid()).submit(_read_stored, part.manifest, sample, self._cache)
            self._reads[position] = _Read(part, future)


class _Read(NamedTuple):
    part: MixturePart
    stored: Future[tuple[bytes, str]]


class _Draw(NamedTuple):
    """Positions of a micro-batch, and the positions that the same process will be asked for next."""

    positions: list[int]
    upcoming: list[int]


class _MicroBatches(Sampler[_Draw]):
    """Positions of one rank's micro-batches, step after step; a DataLoader gives them to its processes in turn."""

    def __init__(
        self, steps: range, global_batch: int, micro_batch: int, rank: int, world_size: int, workers: int
    ) -> None:
        self.steps = steps
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.processes = max(1, workers)

    def __iter__(self) -> Iterator[_Draw]:
        batches = itertools.chain.from_iterable(map(self.of_step, self.steps))
        reach = self.processes * -(-_READS_AHEAD // self.micro_batch)
        known = deque(itertools.islice(batches, reach))
        while known:
            known.extend(itertools.islice(batches, 1))
            positions = known.popleft()
            own = itertools.islice(known, self.processes - 1, None, self.processes)
            yield _Draw(positions, [position for batch in own for position in batch])

    def of_step(self, step: int) -> list[list[int]]:
        mine = list(rank_positions(step, self.global_batch, self.rank, self.world_size))
        return [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]


class TrainingStream:
    """One rank's share of the data stream: the micro-batches of each step, whose gradients are accumulated.

    Args:
        dataset: the run's samples by position.
        steps: the steps to yield, from the one to resume at.
        global_batch: samples per step over all ranks; it does not depend on the number of ranks.
        micro_batch: samples that a rank computes at a time.
        rank, world_size: the rank of this process, and the number of ranks.
        workers: number of loader processes; 0: this process loads.
        pinned: whether batches are in pinned memory, from which a GPU can copy while it computes.
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
        pinned: bool = False,
    ) -> None:
        self.steps = steps
        self._batches = _MicroBatches(steps, global_batch, micro_batch, rank, world_size, workers)
        self._loader = DataLoader(
            _ErrorsAsValues(dataset),
            batch_sampler=self._batches,  # type: ignore[arg-type]  # it may yield whatever __getitems__ takes
            collate_fn=_pack_unless_error,
            num_workers=workers,
            # A fork of a process that already runs threads (Ray's, OpenMP's) can deadlock.
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_one_thread,
            pin_memory=pinned,
            generator=torch.Generator(),  # for the seed of the loader processes, in place of the global generator
        )

    def __iter__(self) -> Iterator[tuple[int, Iterator[FlowBatch]]]:
        """Yields (step, its micro-batches); the micro-batches must be consumed before the next step.

        Raises the DataError that a loader process reported.
        """
        batches: Iterator[_Packed | DataError] = iter(self._loader)
        if self._loader.num_workers and not self._loader.pin_memory:  # pinning has its own thread that fetches ahead
            batches = read_ahead(batches, _BATCHES_AHEAD)
        for step in self.steps:
            count = len(self._batches.of_step(step))
            yield step, (_unpack(_without_error(next(batches))) for _ in range(count))


class _ErrorsAsValues(Dataset[FlowBatch]):
    """Returns a DataError instead of raising it: a DataLoader would pass it on as text, inside a stack trace."""

    def __init__(self, dataset: PositionDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, draw: _Draw) -> list[FlowBatch] | DataError:
        try:
            return self._dataset.__getitems__(draw)
        except DataError as error:
            return error


def _without_error(batch: _Packed | DataError) -> _Packed:
    if isinstance(batch, DataError):
        raise batch
    return batch


def to_tensors(sample: FlowSample) -> FlowBatch:
    """A sample as tensors, channels first. Raises ValueError for a sample without ground truth."""
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
    return _unpack(_pack(samples))


def _pack_unless_error(samples: Sequence[FlowBatch] | DataError) -> _Packed | DataError:
    return samples if isinstance(samples, DataError) else _pack(samples)


def _pack(samples: Sequence[FlowBatch]) -> _Packed:
    shape = (len(samples), *samples[0].valid.shape)
    packed = _Packed(torch.empty(prod(shape) * _PIXEL_BYTES, dtype=torch.uint8), shape)
    for tensors, batch in zip(zip(*samples, strict=True), _unpack(packed), strict=True):
        torch.stack(tensors, out=batch)
    return packed


def _unpack(packed: _Packed) -> FlowBatch:
    """The tensors of a batch as views of the packed data."""
    batch, height, width = packed.shape
    pixels = prod(packed.shape)
    flow, image0, image1, valid = packed.data.split_with_sizes([8 * pixels, 3 * pixels, 3 * pixels, pixels])
    return FlowBatch(
        image0=image0.view(batch, 3, height, width),
        image1=image1.view(batch, 3, height, width),
        flow=flow.view(torch.float32).view(batch, 2, height, width),
        valid=valid.view(torch.bool).view(batch, height, width),
    )


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # the loader processes already run in parallel
