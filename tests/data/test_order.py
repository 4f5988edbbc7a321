"""dmae_ds/data/order.py: every sample exactly once an epoch, the same global batches however they are divided."""

import time

import numpy as np
import pytest

from dmae_ds.data.order import batch_positions, num_steps, permute, sample_ids


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 255, 256, 257, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(np.arange(n), n, np.uint64(key))) == list(range(n))


def test_order_is_pinned():
    """A run that is resumed with a later release must go on in the same order."""
    _, ids = sample_ids(np.arange(8), num_samples=1000, seed=0)
    assert ids.tolist() == [495, 961, 616, 596, 824, 125, 265, 714]


def test_an_epoch_of_a_billion_samples_costs_nothing():
    n = 10**9
    start = time.perf_counter()
    epochs, ids = sample_ids(np.arange(3 * n - 2048, 3 * n + 2048), num_samples=n, seed=1)
    assert time.perf_counter() - start < 1
    assert set(epochs.tolist()) == {2, 3} and 0 <= ids.min() and ids.max() < n
    assert len(set(ids.tolist())) > 4090


def test_places_are_uniform():
    """Over 2,000 epochs each of 10 samples comes first equally often: chi-square, 9 degrees of freedom, p = 1e-4."""
    _, firsts = sample_ids(np.arange(2000) * 10, num_samples=10, seed=0)
    counts = np.bincount(firsts, minlength=10)
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
        positions = np.concatenate([
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
        ])
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
