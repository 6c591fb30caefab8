"""The n-th sample of a run: every id as often as it should, for any number of workers, from any position."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_etl.order import Order, permute, rank_positions, sample_generator

mixtures = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 7)), min_size=1, max_size=5)


def located(order: Order, positions: range) -> list[tuple[int, int]]:
    parts, samples = order.locate(positions)
    return list(zip(parts.tolist(), samples.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(mixture=mixtures, seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_every_id_comes_exactly_repeats_times_an_epoch(mixture, seed, epoch):
    sizes, repeats = zip(*mixture, strict=True)
    order = Order(sizes, repeats, seed)
    start = epoch * order.epoch_length
    seen = Counter(located(order, range(start, start + order.epoch_length)))
    expected = {(part, i): times for part, (size, times) in enumerate(mixture) for i in range(size)}
    assert seen == expected


@settings(max_examples=60, deadline=None)
@given(world=st.integers(1, 16), batch=st.integers(16, 64), step=st.integers(0, 10**9))
def test_a_steps_ranks_share_its_batch_evenly_without_gap_or_overlap(world, batch, step):
    slices = [rank_positions(step, batch, rank, world) for rank in range(world)]
    assert list(itertools.chain(*slices)) == list(range(step * batch, (step + 1) * batch))
    lengths = {len(part) for part in slices}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("batch", [8, 12, 16])
def test_restripe_8_to_2_to_8_same_remaining_set(batch):
    order = Order((50, 7), (1, 3), seed=5)
    steps = range(order.epoch_length // batch)
    striped = []
    for step in steps:
        world = 8 if step % 3 != 1 else 2
        for rank in range(world):
            striped += located(order, rank_positions(step, batch, rank, world))
    assert striped == located(order, range(len(steps) * batch))


def test_resume_needs_the_position_only():
    order = Order((100, 20), (1, 5), seed=3)
    assert located(order, range(500))[137:] == located(Order((100, 20), (1, 5), seed=3), range(137, 500))


def test_epochs_and_seeds_have_their_own_shuffle():
    order = Order((64,), (1,), seed=0)
    first, second = located(order, range(64)), located(order, range(64, 128))
    other = located(Order((64,), (1,), seed=1), range(64))
    assert sorted(first) == sorted(second) == sorted(other)
    assert len({tuple(first), tuple(second), tuple(other), tuple(sorted(first))}) == 4


@pytest.mark.parametrize("length", [2, 5, 17])
def test_every_sample_is_equally_likely_at_every_position(length):
    draws = 600
    counts = np.zeros((length, length))
    for seed in range(draws):
        parts_and_samples = Order((length,), (1,), seed).locate(range(length))
        counts[np.arange(length), parts_and_samples[1]] += 1
    expected = draws / length
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (length - 1) ** 2
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)


def test_neighbours_are_not_kept_together():
    shuffled = permute(np.arange(100_000), 100_000, np.arange(1, 7, dtype=np.uint64))
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(shuffled)) == 1) < 0.001


def test_a_billion_samples_need_no_memory():
    order = Order((10**9,), (1,), seed=9)
    _, samples = order.locate([0, 1, 10**9 - 1, 10**9, 10**12])
    assert len(set(samples.tolist())) == 5
    assert samples.min() >= 0
    assert samples.max() < 10**9


def test_the_order_is_frozen():
    """A changed order would silently change what a resumed run trains on."""
    _, samples = Order((10,), (1,), seed=7).locate(range(20))
    assert samples.tolist() == FROZEN


FROZEN = [7, 9, 5, 0, 3, 4, 8, 2, 6, 1, 4, 6, 9, 7, 8, 0, 1, 2, 3, 5]


def test_generators_differ_by_seed_and_position_and_by_nothing_else():
    draws = {key: sample_generator(*key).integers(2**62) for key in itertools.product(range(3), range(50))}
    assert len(set(draws.values())) == 150
    assert draws[1, 7] == sample_generator(1, 7).integers(2**62)


@pytest.mark.parametrize(("sizes", "repeats"), [((), ()), ((3,), (1, 2)), ((0,), (1,)), ((3,), (0,))])
def test_an_order_without_samples_is_refused(sizes, repeats):
    with pytest.raises(ValueError, match="sizes"):
        Order(sizes, repeats, seed=0)


def test_the_generators_are_frozen():
    """As the order is: a resumed run's samples would be augmented otherwise from there on."""
    assert sample_generator(7, 3).integers(1000, size=4).tolist() == [727, 975, 538, 884]


def test_the_order_of_a_mixture_with_repeats_is_frozen():
    parts, samples = Order((3, 2), (2, 3), seed=7).locate(range(12))
    assert parts.tolist() == [1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0]
    assert samples.tolist() == [1, 1, 2, 0, 0, 1, 0, 2, 0, 1, 0, 1]


def test_a_single_sample_is_every_sample():
    assert Order((1,), (1,), seed=3).locate(range(3))[1].tolist() == [0, 0, 0]
