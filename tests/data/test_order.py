"""dmae_ds/data/order.py: every sample once an epoch, and global batches that do not depend on ranks."""

import itertools
import time

import numpy as np
import pytest

from dmae_ds.data import order as order_module
from dmae_ds.data.order import (
    WINDOW_BLOCKS,
    batch_positions,
    block_spans,
    epoch_key,
    num_held,
    num_lanes,
    num_steps,
    permute,
    sample_ids,
)


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 255, 256, 257, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(np.arange(n), n, np.uint64(key))) == list(range(n))


def test_order_is_pinned():
    """A run that is resumed with a later release must continue in the same order."""
    _, ids = sample_ids(np.arange(8), num_samples=1000, seed=0)
    assert ids.tolist() == [495, 961, 616, 596, 824, 125, 265, 714]


def test_an_epoch_of_a_billion_samples_takes_no_time():
    n = 10**9
    start = time.perf_counter()
    epochs, ids = sample_ids(np.arange(3 * n - 2048, 3 * n + 2048), num_samples=n, seed=1)
    assert time.perf_counter() - start < 1
    assert set(epochs.tolist()) == {2, 3} and ids.min() >= 0 and ids.max() < n
    assert len(set(ids.tolist())) > 4090


@pytest.mark.parametrize("n", [10, 100, 1000])  # of 4, 7 and 10 bits
def test_places_are_uniform(n):
    """Over 2,000 epochs a tenth of the samples comes first as often as another (chi-square, p = 1e-4)."""
    _, firsts = sample_ids(np.arange(2000) * n, num_samples=n, seed=0)
    counts = np.bincount(firsts * 10 // n, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


def test_neighbours_are_not_correlated():
    _, ids = sample_ids(np.arange(10_000), num_samples=10_000, seed=0)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.04  # four standard deviations
    assert abs(np.corrcoef(ids, np.arange(10_000))[0, 1]) < 0.04


def test_epochs_and_seeds_have_different_orders():
    orders = {
        tuple(sample_ids(np.arange(50) + 50 * epoch, num_samples=50, seed=seed)[1])
        for epoch in range(10)
        for seed in range(10)
    }
    assert len(orders) == 100


@pytest.mark.parametrize("num_samples", [1, 7, 23, 100])
@pytest.mark.parametrize(
    "world_size, accumulation, micro_batch", [(1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 1, 3), (12, 1, 1)]
)
def test_every_sample_comes_once_an_epoch_and_batches_do_not_depend_on_ranks(
    num_samples, world_size, accumulation, micro_batch
):
    """Global batches of 12 straddle the ends of most of these epochs."""
    steps = num_steps(3, num_samples, 12)
    seen = []
    for step in range(steps):
        positions = np.concatenate(
            [
                batch_positions(
                    step,
                    global_batch=12,
                    rank=rank,
                    world_size=world_size,
                    micro_batch=micro_batch,
                    accumulation_step=accumulation_step,
                )
                for rank in range(world_size)
                for accumulation_step in range(accumulation)
            ]
        )
        assert positions.tolist() == list(range(12 * step, 12 * step + 12))
        epochs, ids = sample_ids(positions, num_samples=num_samples, seed=3)
        seen += zip(epochs.tolist(), ids.tolist(), strict=True)
    for epoch in range(3):
        assert sorted(id for e, id in seen if e == epoch) == list(range(num_samples))


def test_num_steps_rounds_up_in_decimals():
    assert num_steps(1, 100, 10) == 10
    assert num_steps(1, 101, 10) == 11
    assert num_steps(1.1, 100, 1) == 110  # in floats 1.1 * 100 is 110.00000000000001
    assert num_steps(800, 1_281_167, 4096) == 250_228


# Blocks. A setting holds everything that the batches of a run could wrongly depend on.


def draw_setting(number):
    """Draw ranks 1-64, workers 0-8, sizes 1-10^9 (log-uniform), blocks, epochs and resume points."""
    rng = np.random.default_rng(number)
    num_samples = int(10 ** rng.uniform(0, 9)) if number % 2 else int(10 ** rng.uniform(0, 3.7))
    world_size, accumulation = int(rng.integers(1, 65)), int(rng.integers(1, 4))
    micro_batch = int(rng.integers(1, 17))
    return {
        "num_samples": num_samples,
        "block": int(rng.choice([1, 2, 3, 16, 64, 1000])),
        "seed": int(rng.integers(0, 2**63)),
        "world_size": world_size,
        "num_workers": int(rng.integers(0, 9)),
        "accumulation": accumulation,
        "micro_batch": micro_batch,
        "global_batch": world_size * accumulation * micro_batch,
        "epoch": int(rng.integers(0, 1000)),
        "resume": float(rng.random()),
    }


def positions_of_a_rank(setting, step, rank, accumulation_step):
    """Positions of one micro-batch, joined from the pieces that its workers load."""
    positions = batch_positions(
        step,
        global_batch=setting["global_batch"],
        rank=rank,
        world_size=setting["world_size"],
        micro_batch=setting["micro_batch"],
        accumulation_step=accumulation_step,
        num_samples=setting["num_samples"],
        block=setting["block"],
    )
    size = setting["micro_batch"]
    num_pieces = max(1, min(setting["num_workers"], size))
    borders = [piece * size // num_pieces for piece in range(num_pieces + 1)]
    return np.concatenate([positions[low:high] for low, high in itertools.pairwise(borders)])


def check_setting(setting):
    """Assert all guarantees of the order for one setting."""
    n, block, seed, batch = (setting[key] for key in ("num_samples", "block", "seed", "global_batch"))
    order = {"num_samples": n, "seed": seed, "block": block}
    first_step = int((setting["epoch"] + setting["resume"]) * n / batch)  # anywhere in an epoch
    for step in range(first_step, first_step + 2):
        ranks = [
            np.concatenate(
                [positions_of_a_rank(setting, step, rank, a) for a in range(setting["accumulation"])]
            )
            for rank in range(setting["world_size"])
        ]
        assert len({len(positions) for positions in ranks}) == 1  # equal counts
        together = np.concatenate(ranks)
        alone = batch_positions(
            step,
            global_batch=batch,
            rank=0,
            world_size=1,
            micro_batch=batch,
            accumulation_step=0,
            num_samples=n,
            block=block,
        )
        assert np.array_equal(together, alone)  # the same global batch, in the same order, for every division
        assert np.array_equal(np.sort(together), np.arange(step * batch, (step + 1) * batch))
        epochs, ids = sample_ids(together, **order)
        one_by_one = [sample_ids(np.array([position]), **order) for position in together[:3]]
        # a position alone determines its sample
        assert [(e[0], i[0]) for e, i in one_by_one] == list(zip(epochs[:3], ids[:3], strict=True))
        assert np.array_equal(epochs, together // n) and ids.min() >= 0 and ids.max() < n
        assert len(set(zip(epochs.tolist(), ids.tolist(), strict=True))) == batch
        for sample_id, (first, length) in zip(ids.tolist(), block_spans(epochs, ids, **order), strict=True):
            assert (sample_id - first) % n < length <= block
    if n <= 5000:  # the whole epoch, and the one after it
        _, ids = sample_ids(np.arange(setting["epoch"] * n, (setting["epoch"] + 2) * n), **order)
        for epoch_ids in (ids[:n], ids[n:]):
            assert np.array_equal(np.sort(epoch_ids), np.arange(n))
    else:
        check_sampled_windows(setting)


def check_sampled_windows(setting):
    """Some thousand places of an epoch have different samples, and windows of a lane map onto whole windows.

    With permutations of known sizes in between, every sample then comes exactly once.
    """
    n, block, epoch = setting["num_samples"], setting["block"], setting["epoch"]
    rng = np.random.default_rng(setting["seed"])
    places = np.unique(np.concatenate([rng.integers(0, n, 2000), np.arange(500), np.arange(n - 500, n)]))
    _, ids = sample_ids(epoch * n + places, num_samples=n, seed=setting["seed"], block=block)
    assert len(np.unique(ids)) == len(places)
    if block == 1:
        return
    lanes = num_lanes(n, block)
    for lane in {0, lanes - 1, int(rng.integers(lanes))}:
        length = n // lanes + (lane < n % lanes)
        start = lane * (n // lanes) + min(lane, n % lanes)
        window = WINDOW_BLOCKS * block
        first = int(order_module._first_window(np.array(lane), lanes, window))
        number = int(rng.integers(0, 2 + (length - first) // window))
        low, high = 0, first
        if number:
            low, high = first + (number - 1) * window, min(length, first + number * window)
        rows = np.arange(low, min(high, length))
        keys = epoch_key(setting["seed"], np.full(len(rows), epoch))
        shuffled = order_module._shuffle_lanes(rows * lanes + lane, n, block, keys)
        assert np.array_equal(np.sort(shuffled), start + rows)


@pytest.mark.parametrize("start", range(0, 120, 40))
def test_block_order_over_random_settings(start):
    for number in range(start, start + 40):
        check_setting(draw_setting(number))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(120, 2200, 130))
def test_block_order_over_2000_more_settings(start):
    for number in range(start, start + 130):
        check_setting(draw_setting(number))


def test_block_order_is_pinned():
    _, ids = sample_ids(np.arange(8), num_samples=1000, seed=0, block=16)
    assert ids.tolist() == [954, 323, 605, 903, 559, 563, 842, 223]


@pytest.mark.parametrize("block", [1, 16, 64])
def test_every_sample_comes_once_if_the_global_batch_changes_during_the_run(block):
    n, seen, position = 1000, [], 0
    for batch in (7, 64, 333, 5, 591):  # 1000 in all
        positions = batch_positions(
            0,
            global_batch=batch,
            rank=0,
            world_size=1,
            micro_batch=batch,
            accumulation_step=0,
            num_samples=n,
            block=block,
        )
        seen += sample_ids(position + positions, num_samples=n, seed=1, block=block)[1].tolist()
        position += batch
    assert sorted(seen) == list(range(n))


def count_reads(n, *, block, readers, batch):
    """Returns (blocks that one reader fetches in an epoch, ideal number, most unused samples it holds)."""
    held, reads, most = {}, 0, 0
    order = {"num_samples": n, "seed": 0, "block": block}
    for step in range(n // batch):
        positions = batch_positions(
            step,
            global_batch=batch,
            rank=readers // 2,
            world_size=readers,
            micro_batch=batch // readers,
            accumulation_step=0,
            num_samples=n,
            block=block,
        )
        epochs, ids = sample_ids(positions, **order)
        for span in block_spans(epochs, ids, **order):
            if span not in held:
                held[span] = span[1]
                reads += 1
            held[span] -= 1
            if not held[span]:
                del held[span]
        most = max(most, sum(held.values()))
    return reads, n / block / readers, most


@pytest.mark.parametrize("block, readers, batch", [(64, 8, 1024), (16, 64, 1024), (64, 4, 256)])
def test_a_reader_fetches_most_of_its_blocks_once_and_holds_few(block, readers, batch):
    reads, ideal, most = count_reads(200_000, block=block, readers=readers, batch=batch)
    assert reads < 1.5 * ideal
    assert most < 1.5 * num_held(200_000, block) / readers
