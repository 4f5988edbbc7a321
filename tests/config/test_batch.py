"""How a global batch is cut: properties over a grid, and the cases that a recipe's objective limits."""

from __future__ import annotations

from itertools import product

import pytest

from dmae_ds.config.batch import smaller_split, split_batch, split_recipe
from dmae_ds.config.load import load_config
from dmae_ds.errors import UserError
from tests.messages import refused

BATCHES = (1, 2, 7, 12, 96, 100, 4096)
GRID = list(product((None, 1, 2, 7, 60, 100, 5000), (1, 2, 3, 8), (1, 2, 3)))  # bound, ranks, group size


@pytest.mark.parametrize("batch", BATCHES)
def test_the_largest_allowed_micro_batch_is_taken_or_none_exists(batch):
    for bound, ranks, group in GRID:
        share, rest = divmod(batch, ranks)
        limit = share if bound is None else min(bound, share)
        allowed = [size for size in range(1, limit + 1) if share % size == 0 and size % group == 0]
        if rest or not allowed:
            with refused("optim.global_batch"):
                split_batch(batch, bound, ranks, group_size=group)
            continue
        micro_batch, accumulation = split_batch(batch, bound, ranks, group_size=group)
        assert micro_batch == max(allowed)
        assert micro_batch * accumulation * ranks == batch


@pytest.mark.parametrize("batch", BATCHES)
def test_exact_is_the_same_cut_or_a_refusal(batch):
    for bound, ranks, group in GRID:
        try:
            nearest = split_batch(batch, bound, ranks, group_size=group)
        except UserError:
            with refused("optim.global_batch"):
                split_batch(batch, bound, ranks, group_size=group, exact=True)
            continue
        if (bound or batch // ranks) == nearest.micro_batch:
            assert split_batch(batch, bound, ranks, group_size=group, exact=True) == nearest
        else:
            with refused("optim.global_batch", batch, ranks, nearest.micro_batch):
                split_batch(batch, bound, ranks, group_size=group, exact=True)


@pytest.mark.parametrize(
    "batch, micro, ranks, expected",
    [
        (4096, 64, 8, (64, 8)),
        (4096, None, 8, (512, 1)),
        (6, 2, 3, (2, 1)),
        (1, None, 1, (1, 1)),
        # A micro-batch is an upper bound: the same recipe continues on other ranks.
        (4096, 60, 8, (32, 16)),
        (4096, 100, 8, (64, 8)),
        (4096, 128, 64, (64, 1)),
        (96, 32, 1, (32, 3)),
        (96, 32, 2, (24, 2)),
        (96, 32, 4, (24, 1)),
        (7, 4, 1, (1, 7)),
    ],
)
def test_cuts_by_hand(batch, micro, ranks, expected):
    assert split_batch(batch, micro, ranks) == expected


@pytest.mark.parametrize("batch, ranks, near", [(4096, 3, (2, 4)), (2, 4, (1, 2)), (4096, 24, (16, 32))])
def test_a_batch_that_the_ranks_do_not_divide_is_refused_with_the_nearest_that_do(batch, ranks, near):
    with refused("optim.global_batch", batch, ranks, *near):
        split_batch(batch, None, ranks)


@pytest.mark.parametrize("batch, micro, ranks, offered", [(4096, 60, 8, 32), (4, 8, 1, 4)])
def test_an_exact_micro_batch_is_taken_or_refused(batch, micro, ranks, offered):
    with refused("optim.micro_batch", micro, offered):
        split_batch(batch, micro, ranks, exact=True)


def load(name: str, *overrides: str):
    return load_config(name, [*overrides, "data.train=nowhere"])


def test_mixed_images_and_repeated_views_stay_in_one_micro_batch():
    mixed = ["digits_g2sd_specific", "objective.augment.mixup=0.8", "optim.global_batch=12"]
    assert split_recipe(load(*mixed, "optim.micro_batch=3"), 1) == (2, 6)
    assert split_recipe(load("digits_mae", "optim.global_batch=24", "data.repeat=4"), 2) == (12, 1)
    assert split_recipe(
        load("digits_mae", "optim.global_batch=24", "data.repeat=4", "optim.micro_batch=10"), 2
    ) == (4, 3)
    with refused(4, "data.repeat", "optim.micro_batch", 3):
        split_recipe(load("digits_mae", "data.repeat=4", "optim.micro_batch=3"), 1)
    with refused("g2sd_specific", "data.repeat", 2):
        split_recipe(load(*mixed, "data.repeat=2"), 1)


def test_an_objective_over_the_whole_batch_accumulates_nothing():
    assert split_recipe(load("digits_mocov3"), 2) == (32, 1)
    assert split_recipe(load("digits_mocov3", "optim.micro_batch=32"), 2) == (32, 1)
    with refused("mocov3", "optim.micro_batch", 32, "optim.global_batch", 64):
        split_recipe(load("digits_mocov3", "optim.micro_batch=32"), 1)


def test_what_fitted_before_is_a_bound_unless_the_recipe_or_the_objective_decides():
    assert split_recipe(load("digits_mae"), 1, fitted=8) == (8, 8)
    assert split_recipe(load("digits_mae", "optim.micro_batch=32"), 1, fitted=8) == (32, 2)
    assert split_recipe(load("digits_mocov3"), 1, fitted=8) == (64, 1)


@pytest.mark.parametrize(
    "recipe, overrides, ranks, expected",
    [
        ("digits_mae", [], 8, [8, 4, 2, 1]),
        ("digits_mae", ["optim.global_batch=100"], 1, [100, 50, 25, 10, 5, 2, 1]),
        ("digits_mae", ["optim.global_batch=48", "data.repeat=3"], 1, [48, 24, 12, 6, 3]),
        ("digits_g2sd_specific", ["objective.augment.mixup=0.8", "optim.global_batch=18"], 1, [18, 6, 2]),
        ("digits_mocov3", [], 8, [8]),
    ],
)
def test_smaller_cuts_by_halves(recipe, overrides, ranks, expected):
    config = load(recipe, *overrides)
    split, sizes = split_recipe(config, ranks), []
    while split is not None:
        assert split.micro_batch * split.accumulation * ranks == config.optim.global_batch
        sizes.append(split.micro_batch)
        split = smaller_split(config, ranks, split)
    assert sizes == expected
