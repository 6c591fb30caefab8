"""Samples for training, read directly from shards on storage.

`TrainingStream` yields one rank's micro-batches of the run's data stream; its whole state is the step to begin with.
"""

import functools
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets_etl.ahead import read_ahead
from datasets_etl.augment import AugmentConfig, augment
from datasets_etl.batches import FlowBatch, PackedBatch, pack, to_tensors, unpack
from datasets_etl.cache import SampleCache
from datasets_etl.errors import DataError
from datasets_etl.manifest import Manifest
from datasets_etl.order import Order, rank_positions, sample_generator
from datasets_etl.reading import decoded, stored_sample

# Number of samples that a process reads ahead of the one it decodes: enough to hide a bucket's latency.
_READS_AHEAD = 4

# Number of batches that a thread fetches ahead from the loader processes. Each fetch is a handshake, and a step draws
# two batches before it computes.
_BATCHES_AHEAD = 2


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
            sample = decoded(stored.result(), occlusion=False)
            samples.append(to_tensors(augment(sample, part.augmentation, sample_generator(self.seed, position))))
        return samples

    def _begin_reading(self, positions: Sequence[int]) -> None:
        fresh = [position for position in positions if position not in self._reads]
        for position, number, index in zip(fresh, *self.order.locate(fresh), strict=True):
            part = self.mixture[number]
            sample = int(self.selections[number][index])
            future = _reading_threads(os.getpid()).submit(stored_sample, part.manifest, sample, self._cache)
            self._reads[position] = _Read(part, future)


@functools.lru_cache(maxsize=1)
def _reading_threads(pid: int) -> ThreadPoolExecutor:
    """The reading threads of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=_READS_AHEAD, thread_name_prefix="gmflow-read")


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
        batches: Iterator[PackedBatch | DataError] = iter(self._loader)
        if self._loader.num_workers and not self._loader.pin_memory:  # pinning has its own thread that fetches ahead
            batches = read_ahead(batches, _BATCHES_AHEAD)
        for step in self.steps:
            count = len(self._batches.of_step(step))
            yield step, (unpack(_without_error(next(batches))) for _ in range(count))


class _ErrorsAsValues(Dataset[FlowBatch]):
    """Returns a DataError instead of raising it: a DataLoader would pass it on as text, inside a stack trace."""

    def __init__(self, dataset: PositionDataset) -> None:
        self._dataset = dataset

    def __getitems__(self, draw: _Draw) -> list[FlowBatch] | DataError:
        try:
            return self._dataset.__getitems__(draw)
        except DataError as error:
            return error


def _without_error(batch: PackedBatch | DataError) -> PackedBatch:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _pack_unless_error(samples: Sequence[FlowBatch] | DataError) -> PackedBatch | DataError:
    return samples if isinstance(samples, DataError) else pack(samples)


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # the loader processes already run in parallel
