"""The stream of a run: the same samples for every world size, bit-equal in every worker, from any step."""

import dataclasses
import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets_etl import loader, reading
from datasets_etl.augment import AugmentConfig, augment
from datasets_etl.batches import FlowBatch
from datasets_etl.cache import SampleCache
from datasets_etl.errors import DataError
from datasets_etl.evaluation_set import EvaluationSet
from datasets_etl.loader import MixturePart, PositionDataset, TrainingStream, _MicroBatches
from datasets_etl.manifest import Manifest
from datasets_etl.order import Order, rank_positions, sample_generator
from datasets_etl.reading import read_sample, stored_sample

AUGMENTATION = AugmentConfig(crop=(32, 48), min_log2_scale=-0.1, max_log2_scale=0.4, hflip=0.5, vflip=0.1)


@pytest.fixture(scope="module")
def dataset(sharded_chairs, sharded_kitti) -> PositionDataset:
    chairs, kitti = Manifest.load(sharded_chairs.manifest_url), Manifest.load(sharded_kitti.manifest_url)
    return PositionDataset(
        [MixturePart(chairs, "train", 1, AUGMENTATION), MixturePart(kitti, "training", 2, AUGMENTATION)], seed=4
    )


def stream(dataset: PositionDataset, steps: range, world_size: int, micro_batch: int = 2, workers: int = 0):
    """Step → all ranks' micro-batches, joined."""
    ranks = [
        TrainingStream(
            dataset,
            steps,
            global_batch=6,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            workers=workers,
        )
        for rank in range(world_size)
    ]
    joined = {}
    for several in zip(*ranks, strict=True):
        step = several[0][0]
        batches = list(itertools.chain.from_iterable(batches for _, batches in several))
        joined[step] = FlowBatch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
    return joined


def same(one: FlowBatch, other: FlowBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_holds_its_samples_in_order(dataset, workers):
    rank1 = TrainingStream(dataset, range(1), global_batch=6, micro_batch=2, rank=1, world_size=2, workers=workers)
    batches = [batch for _, batches in rank1 for batch in batches]
    positions = [*rank_positions(0, 6, rank=1, world_size=2)]
    assert [len(batch.valid) for batch in batches] == [2, 1]
    for name in FlowBatch._fields:
        together = torch.cat([getattr(batch, name) for batch in batches])
        single = torch.stack([getattr(dataset[position], name) for position in positions])
        assert torch.equal(together, single), name
        assert together.dtype == single.dtype, name


def test_an_epoch_mixes_the_parts_as_often_as_they_are_repeated(dataset):
    assert dataset.order.epoch_length == 6 + 2 * 3


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 2), (3, 1), (4, 2), (6, 1), (1, 6)])
def test_every_world_size_and_micro_batch_sees_the_same_batches(dataset, world_size, micro_batch):
    expected = stream(dataset, range(3), world_size=1)
    found = stream(dataset, range(3), world_size, micro_batch)
    assert all(same(found[step], expected[step]) for step in range(3))


def test_a_stream_begun_at_a_step_continues_the_one_that_ended_there(dataset):
    whole = stream(dataset, range(5), world_size=2)
    rest = stream(dataset, range(3, 5), world_size=2)
    assert list(rest) == [3, 4]
    assert all(same(rest[step], whole[step]) for step in rest)


@pytest.mark.slow
def test_loader_processes_give_the_same_bits(dataset):
    here = stream(dataset, range(2), world_size=1)
    there = stream(dataset, range(2), world_size=1, workers=2)
    assert all(same(there[step], here[step]) for step in range(2))


@pytest.mark.parametrize(("micro_batch", "ahead"), [(1, 4), (2, 4), (3, 6)])
def test_samples_are_read_before_they_are_asked_for_and_once(dataset, monkeypatch, micro_batch, ahead):
    """Also over the end of a micro-batch and of a step: with one sample at a time every read would be waited for."""
    read = []

    def counting(manifest, index, cache):
        read.append((manifest.url, index))
        return stored_sample(manifest, index, cache)

    monkeypatch.setattr(loader, "stored_sample", counting)
    batches = iter(_MicroBatches(range(4), 6, micro_batch, rank=0, world_size=1, workers=0))
    dataset.__getitems__(next(batches))
    for begun in dataset._reads.values():
        begun.stored.result()
    assert len(read) == micro_batch + ahead
    for draw in batches:
        dataset.__getitems__(draw)
    assert len(read) == 4 * 6
    assert not dataset._reads


def test_each_loader_process_reads_ahead_what_it_will_be_asked_for():
    draws = list(_MicroBatches(range(3), 12, 2, rank=1, world_size=2, workers=3))
    dealt = [list(draws[process::3]) for process in range(3)]
    for mine in dealt:
        for now, *later in (mine[number:] for number in range(len(mine))):
            expected = [position for draw in later[:2] for position in draw.positions]
            assert now.upcoming == expected


def test_batches_have_the_shapes_and_types_they_promise(dataset):
    batch = stream(dataset, range(1), world_size=1)[0]
    assert batch.image0.shape == batch.image1.shape == (6, 3, 32, 48)
    assert batch.image0.dtype == torch.uint8
    assert batch.flow.shape == (6, 2, 32, 48)
    assert batch.flow.dtype == torch.float32
    assert batch.valid.shape == (6, 32, 48)
    assert batch.valid.dtype == torch.bool
    assert torch.isfinite(batch.flow).all()


def test_batches_are_pinned_where_that_is_asked_for(dataset):
    pinned = TrainingStream(dataset, range(1), global_batch=2, micro_batch=2, rank=0, world_size=1, pinned=True)
    if torch.cuda.is_available():
        for _, batches in pinned:
            assert all(tensor.is_pinned() for batch in batches for tensor in batch)
    else:  # PyTorch says that it would, had it a GPU
        with pytest.warns(UserWarning, match="pin_memory"):
            list(pinned)


def test_the_same_sample_is_augmented_anew_each_time_it_comes(dataset):
    positions = range(3 * dataset.order.epoch_length)
    parts, samples = dataset.order.locate(positions)
    times = [p for p in positions if parts[p] == 0 and samples[p] == 0]
    crops = {zlib.crc32(dataset[p].image0.numpy().tobytes()) for p in times}
    assert len(times) == len(crops) == 3


def test_an_evaluation_set_is_the_subset_in_order_untouched(sharded_chairs):
    chosen = EvaluationSet(Manifest.load(sharded_chairs.manifest_url), "val")
    assert [chosen[i].key for i in range(len(chosen))] == ["val_00007", "val_00008"]
    assert len(EvaluationSet(chosen.manifest, None, limit=3)) == 3


def test_an_evaluation_set_reads_each_sample_from_storage_once_where_it_is_cached(
    sharded_chairs, tmp_path, monkeypatch
):
    manifest = Manifest.load(sharded_chairs.manifest_url)
    cache = SampleCache(tmp_path / "cache", 1 << 30)
    cached = EvaluationSet(manifest, "val", cache=cache)
    first = [cached[number].flow for number in range(len(cached))]
    monkeypatch.setattr(reading, "read_sample_bytes", lambda *_: pytest.fail("read from storage again"))
    again = [cached[number].flow for number in range(len(cached))]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_samples_without_truth_are_never_trained_or_scored_on(sharded_kitti):
    manifest = Manifest.load(sharded_kitti.manifest_url)
    assert manifest.subsets == {"testing": 1, "training": 3}
    assert len(EvaluationSet(manifest, None)) == 3
    assert len(manifest.select(None, with_truth=False)) == 4
    with pytest.raises(DataError, match="no sample with ground truth in testing"):
        EvaluationSet(manifest, "testing")


def test_a_damaged_byte_names_shard_and_sample(sharded_chairs, tmp_path):
    source = Path(sharded_chairs.manifest_url.removeprefix("file://"))
    manifest = Manifest.load(sharded_chairs.manifest_url)
    shard, entry = manifest.place(1)
    (tmp_path / "shards").mkdir()
    (tmp_path / source.name).write_bytes(source.read_bytes())
    data = bytearray(manifest.store().read(shard.name))
    data[entry.offset + entry.length // 2] ^= 1
    (tmp_path / shard.name).write_bytes(bytes(data))
    copy = EvaluationSet(Manifest.load(str(tmp_path / source.name)), None)
    assert copy[0].key != entry.key
    with pytest.raises(DataError, match=rf"{Path(shard.name).name}: sample {entry.key} .*damaged"):
        copy[1]


def test_generators_of_ranks_leave_the_global_generators_alone(dataset):
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    stream(dataset, range(2), world_size=2)
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_a_position_is_its_parts_sample_augmented_as_that_part_says_by_the_runs_seed(sharded_chairs, sharded_kitti):
    chairs, kitti = Manifest.load(sharded_chairs.manifest_url), Manifest.load(sharded_kitti.manifest_url)
    livelier = dataclasses.replace(AUGMENTATION, max_log2_scale=0.9, hflip=1.0)
    parts = [MixturePart(chairs, "train", 1, AUGMENTATION), MixturePart(kitti, "training", 2, livelier)]
    dataset = PositionDataset(parts, seed=9)
    positions = range(dataset.order.epoch_length)
    for position, number, index in zip(positions, *Order((6, 3), (1, 2), seed=9).locate(positions), strict=True):
        part = parts[number]
        stored = read_sample(part.manifest, int(part.manifest.select(part.subset)[index]))
        expected = augment(stored, part.augmentation, sample_generator(9, position))
        found = dataset[position]
        for name in ("image0", "image1", "flow"):
            pixels = getattr(found, name).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(pixels, getattr(expected, name), name)
        np.testing.assert_array_equal(found.valid.numpy(), expected.valid)
