"""dmae_ds/data/batch_spec.py: subsets, augmentation, repeated images; contradictory settings are refused."""

import numpy as np
import pytest
import torch

from dmae_ds.data.batch import _piece_positions, _piece_rows
from dmae_ds.data.batch_spec import BatchSpec
from tests.data.batches import GLOBAL_BATCH, NUM_STEPS, assert_same, damage, global_batches, join, train
from tests.messages import refused

SUBSET = np.array([1, 4, 9, 10, 22])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"world_size": 2, "micro_batch": 3}, ("global_batch 8", "micro_batch 3", "world_size 2", "= 6")),
        ({"world_size": 2, "repeat": 3}, ("data.repeat 3", "micro-batch of 4")),
        ({"subset": SUBSET, "block": 2}, ("data.block 2", "data.block=1")),
    ],
)
def test_settings_that_contradict_each_other_are_refused(shard_set, changes, words):
    with refused(*words):
        train(shard_set, **changes)


def test_an_epoch_of_a_subset_is_the_subset(shard_set):
    fields = join(train(shard_set, stop_step=5, subset=SUBSET))  # 40 samples: eight epochs of five
    ids, epochs = fields[3], fields[4]
    assert all(sorted(ids[epochs == epoch].tolist()) == SUBSET.tolist() for epoch in range(8))
    assert len({tuple(ids[epochs == epoch].tolist()) for epoch in range(8)}) > 3
    reference = global_batches(shard_set, stop_step=5, subset=SUBSET)
    for changes in (
        {"world_size": 2},
        {"accumulation": 2},
        {"num_workers": 2},
        {"world_size": 2, "num_workers": 1},
    ):
        assert_same(global_batches(shard_set, **changes, stop_step=5, subset=SUBSET), reference)


def test_a_corrupt_sample_of_a_subset_is_replaced_by_one_of_the_subset(shard_set):
    damage(shard_set, 4)
    ids = join(train(shard_set, stop_step=5, subset=SUBSET, max_corrupt=1))[3]
    assert 4 not in ids and set(ids.tolist()) == set(SUBSET.tolist()) - {4}


def test_an_augmentation_receives_each_view_and_draws_keyed_by_the_sample(shard_set):
    def augment(view, rng):
        assert view.shape == (3, 16, 16) and view.dtype == np.uint8
        return np.full_like(view, rng.integers(256))

    plain, augmented, by_workers = (
        join(train(shard_set, augment=function, num_workers=num_workers))
        for function, num_workers in ((None, 0), (augment, 0), (augment, 2))
    )
    assert torch.equal(augmented[0], by_workers[0])
    assert all(torch.equal(a, b) for a, b in zip(augmented[1:], plain[1:], strict=True))
    colours = augmented[0][:, 0, 0, 0]
    assert (augmented[0] == colours[:, None, None, None]).all() and len(colours.unique()) > 20


@pytest.mark.parametrize(
    "block, world_size, accumulation, num_workers", [(1, 1, 1, 0), (1, 2, 1, 2), (1, 1, 2, 0), (2, 2, 1, 2)]
)
def test_repeated_images_are_next_to_each_other_and_differ(
    shard_set, block, world_size, accumulation, num_workers
):
    """With two rows an image, first rows are those of a batch of half the size without repeating."""
    once = global_batches(shard_set, global_batch=GLOBAL_BATCH // 2, block=block)
    twice = global_batches(
        shard_set,
        world_size=world_size,
        accumulation=accumulation,
        num_workers=num_workers,
        repeat=2,
        block=block,
    )
    assert len(twice) == NUM_STEPS
    first, second = slice(0, None, 2), slice(1, None, 2)
    for fields, expected in zip(twice, once, strict=True):
        images, noise, _, ids, epochs = fields
        order = np.lexsort((ids[first].numpy(), epochs[first].numpy()))
        expected_order = np.lexsort((expected[3].numpy(), expected[4].numpy()))
        for field, expected_field in zip(fields, expected, strict=True):
            assert torch.equal(field[first][order], expected_field[expected_order])
        assert torch.equal(ids[first], ids[second]) and torch.equal(epochs[first], epochs[second])
        assert not (images[first] == images[second]).flatten(1).all(1).any()
        assert not (noise[first] == noise[second]).any()


@pytest.mark.parametrize(("ranks", "pieces", "repeat", "block"), [(1, 1, 1, 1), (2, 1, 2, 1), (4, 2, 1, 2)])
def test_rows_number_the_run_and_a_replay_shows_old_steps_again(ranks, pieces, repeat, block):
    shown: dict[int, list[int]] = {}
    for rank in range(ranks):
        spec = BatchSpec(
            img_size=8,
            num_patches=4,
            crop_scale=(0.5, 1.0),
            flip=False,
            seed=0,
            global_batch=32,
            micro_batch=4,
            accumulation=8 // ranks,
            rank=rank,
            world_size=ranks,
            repeat=repeat,
            block=block,
            replay=3,
        )
        per_step = spec.accumulation * pieces
        for number in range(5 * per_step):
            rows = _piece_rows(number, spec, num_pieces=pieces)
            positions = _piece_positions(number, spec, num_samples=100, num_pieces=pieces)
            assert len(rows) == repeat * len(positions)
            step = number // per_step
            shown.setdefault(step, []).extend(zip(rows.tolist(), positions.repeat(repeat), strict=True))
    for step, pairs in shown.items():
        assert sorted(row for row, _ in pairs) == list(range(step % 3 * 32, (step % 3 + 1) * 32))
        assert sorted(pairs) == sorted(shown[step % 3])
