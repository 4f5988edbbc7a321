"""The order of samples: a pure function of (seed, position), so nothing is shuffled, stored or replayed.

Position p of a run is epoch p // N, place p % N, and the sample at a place is a keyed permutation evaluated
there: a Feistel network with cycle walking, O(1) a position at any N. So every sample comes exactly once an
epoch, global batches are the same for every number of ranks and workers, and a run resumes at any step by
arithmetic. The state of the reader is one integer, the number of samples consumed.

Block 1 is an exact global shuffle. Larger blocks are for storage that is slow to seek: C consecutive samples
are read at once. The blocks are permuted and cut into lanes, and a batch takes from all lanes in turn; a lane
is shuffled within windows of WINDOW_BLOCKS blocks. The lanes' first windows differ in length, so that they
open their blocks at different times, and the borders of the blocks move every epoch. A rank takes the lanes
that are its part of the global batch, so the blocks it needs next are mostly those that it holds.
"""

import math
from fractions import Fraction

import numpy as np

ORDER_VERSION = 1  # stored in checkpoints; raise it with any change of the order
WINDOW_BLOCKS = 4
MAX_LANES = 1024

NUM_ROUNDS = 6
SHARE_KEY = np.uint64(1)  # of the draw of a share of the samples: the same for every seed
MIN_HALF_BITS = 3  # a domain of at least 64: below, six rounds are visibly not uniform

# splitmix64 (Steele, Lea, Flood 2014): its increment, and the two multipliers of its finaliser (Stafford's
# mix 13)
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def num_steps(epochs: float, num_samples: int, global_batch: int) -> int:
    """Number of steps that see every sample `epochs` times; the last one may reach into the next epoch."""
    # str: the decimal number that the user wrote; in floats, ceil(1.1 * 100) is 111
    return math.ceil(Fraction(str(epochs)) * num_samples / global_batch)


def num_in_share(num_samples: int, share: float) -> int:
    """Number of samples in a share of all, at least 1."""
    return max(1, round(share * num_samples))


def share_ids(num_samples: int, share: float) -> np.ndarray:
    """Rising ids of a share of the samples, int64; those of a smaller share are among a larger one's."""
    return np.sort(permute(np.arange(num_in_share(num_samples, share)), num_samples, SHARE_KEY))


def batch_positions(
    step: int,
    *,
    global_batch: int,
    rank: int,
    world_size: int,
    micro_batch: int,
    accumulation_step: int,
    num_samples: int | None = None,
    block: int = 1,
) -> np.ndarray:
    """Positions in the run of one micro-batch of one rank, [micro_batch] int64.

    Step s consumes [s * global_batch, (s + 1) * global_batch), with a block above 1 sorted by lane
    (num_samples is needed then). A rank takes a contiguous part of it, and its micro-batches are consecutive
    pieces of that part.
    """
    first = rank * (global_batch // world_size) + accumulation_step * micro_batch
    if block == 1:
        return np.arange(first, first + micro_batch, dtype=np.int64) + step * global_batch
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    by_lane = np.argsort(positions % num_samples % num_lanes(num_samples, block), kind="stable")
    return positions[by_lane[first : first + micro_batch]]


def num_lanes(num_samples: int, block: int) -> int:
    """Number of lanes of an epoch, which depends on the data and the block alone.

    A power of two, as global batches mostly are: a batch that is a multiple or a fraction takes from each
    lane equally, so a reader keeps its lanes. Otherwise lanes move to other readers, and their blocks are
    read again (BENCHMARKS.md).
    """
    fitting = min(MAX_LANES, num_samples // (WINDOW_BLOCKS * block))
    return 2 ** (fitting.bit_length() - 1) if fitting else 1


def num_held(num_samples: int, block: int) -> int:
    """Approximate upper bound of the samples that all ranks together have read and not used yet.

    They are half of the windows, and the blocks that the windows' borders cut.
    """
    return num_lanes(num_samples, block) * block * (WINDOW_BLOCKS + 2) // 2


def sample_ids(
    positions: np.ndarray, *, num_samples: int, seed: int, block: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Map positions, also of several epochs, to (epochs, ids), both int64 in the shape of `positions`."""
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_samples)
    keys = epoch_key(seed, epochs)
    if block == 1:
        is_one_epoch = epochs.size > 0 and (epochs == epochs.flat[0]).all()
        return epochs, permute(places, num_samples, keys.flat[0] if is_one_epoch else keys)
    shuffled = _shuffle_lanes(places, num_samples, block, keys)
    number, offset = np.divmod(shuffled, block)
    full_blocks = num_samples // block  # a shorter block at the end stays where it is
    is_full = number < full_blocks
    number[is_full] = permute(number[is_full], full_blocks, _mix(keys[is_full] + np.uint64(1)))
    return epochs, (_rotation(keys, num_samples) + number * block + offset) % num_samples


def block_spans(
    epochs: np.ndarray, ids: np.ndarray, *, num_samples: int, seed: int, block: int
) -> list[tuple[int, int]]:
    """Blocks to read at once for each (epoch, id), as (first id, number of ids); ids wrap at num_samples."""
    if block == 1:
        return [(sample_id, 1) for sample_id in ids.tolist()]
    rotation = _rotation(epoch_key(seed, epochs), num_samples)
    start = (ids - rotation) % num_samples // block * block
    first, length = (rotation + start) % num_samples, np.minimum(block, num_samples - start)
    return list(zip(first.tolist(), length.tolist(), strict=True))


def _shuffle_lanes(places: np.ndarray, num_samples: int, block: int, keys: np.ndarray) -> np.ndarray:
    """Shuffle places within windows of lanes that take turns; the blocks are permuted afterwards."""
    lanes, window = num_lanes(num_samples, block), WINDOW_BLOCKS * block
    row, lane = np.divmod(places, lanes)
    length, longer = divmod(num_samples, lanes)  # the first lanes have one sample more
    start, length = lane * length + np.minimum(lane, longer), length + (lane < longer)
    first = _first_window(lane, lanes, window)
    number = np.where(row < first, 0, 1 + (row - first) // window)
    low = np.where(number == 0, 0, first + (number - 1) * window)
    high = np.minimum(length, first + number * window)
    window_key = _mix(_mix(_mix(keys + np.uint64(3)) + lane.astype(np.uint64)) + number.astype(np.uint64))
    return start + low + permute(row - low, high - low, window_key)


def _first_window(lane: np.ndarray, lanes: int, window: int) -> np.ndarray:
    """Length of a lane's first window, 1 to `window`; adjacent lanes, which one reader has, differ much."""
    spread = lane * (GOLDEN_GAMMA >> 32) % lanes  # an odd multiplier: a permutation of the lanes
    return 1 + spread * window // lanes


def _rotation(keys: np.ndarray, num_samples: int) -> np.ndarray:
    """First sample id of the first block of an epoch."""
    return (_mix(keys + np.uint64(2)) % np.uint64(num_samples)).astype(np.int64)


def epoch_key(seed: int, epochs: np.ndarray) -> np.ndarray:
    """One 64-bit key for each epoch."""
    seed_key = _mix(np.array([seed % 2**64], dtype=np.uint64))
    return _mix(seed_key + np.asarray(epochs).astype(np.uint64))


def permute(x: np.ndarray, n: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Evaluate the permutation of 0 to n - 1 that `key` selects.

    x: integers in [0, n); n below 2**53 and key uint64: one for all or one for each x
    Returns int64 in the shape of x.
    """
    x = np.asarray(x)
    values = x.astype(np.uint64).ravel()
    sizes, half_bits = _domain(n)
    # [NUM_ROUNDS, 1 or x.size]: a key for each round, ready before the walk; one for all costs half of one
    # for each
    rounds = np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64)[:, None]
    round_keys = _mix(np.asarray(key, dtype=np.uint64).ravel()[None] + rounds * np.uint64(GOLDEN_GAMMA))
    # cycle walking: the domain is a power of four, below 4 n from n = 17 on; step along the cycle until back
    # below n
    outside = np.arange(values.size)
    while outside.size:
        keys_here = round_keys if round_keys.shape[1] == 1 else round_keys[:, outside]
        sizes_here, bits_here = sizes, half_bits
        if sizes.size > 1:
            sizes_here, bits_here = sizes[outside], half_bits[outside]
        values[outside] = stepped = _feistel(values[outside], keys_here, bits_here)
        outside = outside[stepped >= sizes_here]
    return values.astype(np.int64).reshape(x.shape)


def _domain(n: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, half of the bits that number the domain), uint64, one entry for all or one for each."""
    sizes = np.asarray(n, dtype=np.int64).ravel()
    num_bits = np.frexp((sizes - 1).astype(np.float64))[1]  # int.bit_length of n - 1
    return sizes.astype(np.uint64), np.maximum(MIN_HALF_BITS, (num_bits + 1) // 2).astype(np.uint64)


def _feistel(values: np.ndarray, round_keys: np.ndarray, half_bits: np.ndarray) -> np.ndarray:
    """Permute [0, 4**half_bits): each round xors one half of the bits with a keyed hash of the other."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(round_key + right) & mask)
    return left << half_bits | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64: every input bit changes about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))
