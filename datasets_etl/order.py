"""Which sample is the n-th of a run: pure functions of (seed, position), for any number of workers.

A run reads global positions 0, 1, 2, …; with a global batch of B, step s takes positions s·B … s·B+B-1, for any number
of workers. An epoch contains every sample of the mixture, as often as its part is repeated, in a true shuffle. No order
is stored: the shuffle is a keyed permutation that is evaluated only at the positions needed, so the whole state of the
data stream is one integer.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

_ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """The order of a mixture.

    Attributes:
        sizes: number of samples of each part of the mixture, all positive.
        repeats: how often an epoch contains each sample of that part, all positive.
        seed: from 0 to 2^63 - 1.
    """

    sizes: tuple[int, ...]
    repeats: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        if len(self.sizes) != len(self.repeats) or not self.sizes:
            raise ValueError(f"sizes {self.sizes} and repeats {self.repeats} must be equally many, at least one")
        if min(self.sizes) < 1 or min(self.repeats) < 1:
            raise ValueError(f"sizes {self.sizes} and repeats {self.repeats} must be positive")

    @property
    def epoch_length(self) -> int:
        """Positions of one epoch: every sample times its repeats."""
        return sum(size * times for size, times in zip(self.sizes, self.repeats, strict=True))

    def locate(self, positions: Sequence[int] | range | Int64Array) -> tuple[Int64Array, Int64Array]:
        """Global positions [n] → (part of the mixture [n], sample within that part [n])."""
        at = np.asarray(positions, dtype=np.int64)  # [n]
        epochs, within = np.divmod(at, self.epoch_length)
        shuffled = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shuffled[chosen] = permute(within[chosen], self.epoch_length, _key(self.seed, int(epoch)))
        ends = np.cumsum(np.multiply(self.sizes, self.repeats))
        part = np.searchsorted(ends, shuffled, side="right")
        starts = ends - np.multiply(self.sizes, self.repeats)
        return part.astype(np.int64), (shuffled - starts[part]) % np.asarray(self.sizes)[part]


def rank_positions(step: int, global_batch: int, rank: int, world_size: int) -> range:
    """The positions of one rank at one step: a contiguous slice of the batch. Slice lengths differ by at most one."""
    first = step * global_batch
    return range(
        first + rank * global_batch // world_size,
        first + (rank + 1) * global_batch // world_size,
    )


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """The only source of randomness for the sample at a position: the same in every worker and at every attempt."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, position))))


def permute(indices: Int64Array, length: int, key: UInt64Array) -> Int64Array:
    """A keyed permutation of range(length), evaluated at `indices` [n] in O(n) time and memory.

    It is a balanced Feistel network over the next power of four, applied again until the value is below `length`
    (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half_bits = np.uint64(((length - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = _feistel(indices.astype(np.uint64), half_bits, mask, key)
    outside = np.flatnonzero(values >= length)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits, mask, key)
        outside = outside[values[outside] >= length]
    return values.astype(np.int64)


def _feistel(values: UInt64Array, half_bits: np.uint64, mask: np.uint64, key: UInt64Array) -> UInt64Array:
    left, right = values >> half_bits, values & mask
    for round_key in key:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(values: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(seed: int, epoch: int) -> UInt64Array:
    """Independent round keys [rounds] for every (seed, epoch)."""
    digest = hashlib.blake2b(f"gmflow order 1:{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
