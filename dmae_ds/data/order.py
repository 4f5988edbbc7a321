"""The order of samples: a pure function of (seed, position), so nothing is shuffled, stored or replayed.

Position p of a run is epoch p // N, place p % N, and the sample at a place is a keyed permutation evaluated there: a
Feistel network with cycle walking, O(1) a position at any N. Hence every sample exactly once an epoch, global batches
that are the same for every number of ranks and workers, and resuming at any step by arithmetic. The state of the
reader is one integer, the number of samples consumed.
"""

import math
from fractions import Fraction

import numpy as np

NUM_ROUNDS = 6
MIN_HALF_BITS = 3  # a domain of at least 64: below, six rounds are visibly not uniform

# splitmix64 (Steele, Lea, Flood 2014): its increment, and the two multipliers of its finaliser (Stafford's mix 13)
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def num_steps(epochs: float, num_samples: int, global_batch: int) -> int:
    """Steps that see every sample `epochs` times; the last one may run on into the next epoch."""
    # str: the decimal number that the user wrote; in floats, ceil(1.1 * 100) is 111
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch)


def batch_positions(
    step: int, *, global_batch: int, rank: int, world_size: int, micro_batch: int, accumulation_step: int
) -> np.ndarray:
    """Positions of one micro-batch of one rank, [micro_batch] int64.

    Step s consumes [s * global_batch, (s + 1) * global_batch). A rank takes a contiguous part of it, and its
    micro-batches are consecutive pieces of that part.
    """
    rank_batch = global_batch // world_size
    first = step * global_batch + rank * rank_batch + accumulation_step * micro_batch
    return np.arange(first, first + micro_batch, dtype=np.int64)


def sample_ids(positions: np.ndarray, *, num_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (epochs, ids) of positions, both int64 in the shape of `positions`, which may straddle epochs."""
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    return epochs, permute(places, num_samples, epoch_key(seed, epochs))


def epoch_key(seed: int, epochs: np.ndarray) -> np.ndarray:
    """One 64-bit key for each epoch."""
    seed_key = _mix(np.array([seed % 2**64], dtype=np.uint64))
    return _mix(seed_key + np.asarray(epochs).astype(np.uint64))


def permute(x: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """The place of each x in the permutation of 0 to n - 1 that `key` names.

    x: integers in [0, n); key: uint64, one for all or one for each x
    Returns int64 in the shape of x.
    """
    x = np.asarray(x)
    half_bits = max(MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    values = x.astype(np.uint64).ravel()
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), x.shape).ravel()
    # cycle walking: the domain is a power of four, below 4 n from n = 17 on; step along the cycle until back below n
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], half_bits)
        outside = outside[values[outside] >= n]
    return values.astype(np.int64).reshape(x.shape)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    """A permutation of [0, 4**half_bits): each round xors one half with a keyed hash of the other."""
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> bits, values & mask
    for _ in range(NUM_ROUNDS):
        keys = keys + np.uint64(GOLDEN_GAMMA)
        left, right = right, left ^ (_mix(_mix(keys) + right) & mask)
    return left << bits | right


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit changes about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))
