"""Runs in which nothing can be learned are refused; a batch above the data is a warning."""

from __future__ import annotations

import pytest

from dmae_ds.config.load import load_config
from dmae_ds.config.run import ScheduleConfig
from dmae_ds.data.order import num_steps
from dmae_ds.train.learning_rate import check_rates, describe_repeats, learning_rate
from tests.messages import refused


def check(batch, images, **schedule):
    config = ScheduleConfig(global_batch=batch, **schedule)
    check_rates(config, num_steps=num_steps(config.epochs, images, batch), num_images=images)


@pytest.mark.parametrize(
    "batch, images, schedule",
    [
        (4096, 16, {"epochs": 100, "warmup_epochs": 20}),
        (4096, 40, {"epochs": 100, "warmup_epochs": 0.5}),
        (256, 1000, {"epochs": 0.1, "warmup_epochs": 0.01}),
    ],
)
def test_one_step_at_the_start_of_a_warm_up_is_refused(batch, images, schedule):
    with refused(f"optim.global_batch {batch}", f"{images:,} images", "1 step", "optim.warmup_epochs"):
        check(batch, images, **schedule)


@pytest.mark.parametrize("base_lr", [1e41, 1e300, 1.7e36])
def test_a_rate_that_overflows_is_refused(base_lr):
    with refused("optim.base_lr", f"{base_lr:g}"):
        check(256, 1000, base_lr=base_lr)


@pytest.mark.parametrize(
    "batch, images, schedule",
    [
        (4096, 16, {"epochs": 100, "warmup_epochs": 0}),  # one step, at the full rate
        (4096, 41, {"epochs": 100, "warmup_epochs": 99}),  # two steps, the second has a rate
        (8, 16, {"epochs": 1, "warmup_epochs": 0.9}),
    ],
)
def test_a_run_with_one_step_that_learns_is_accepted(batch, images, schedule):
    check(batch, images, **schedule)
    config = ScheduleConfig(global_batch=batch, **schedule)
    steps = num_steps(config.epochs, images, batch)
    assert any(learning_rate(config, step * batch / images) > 0 for step in range(steps))


@pytest.mark.parametrize(
    "batch, images, repeat, warns",
    [
        (16, 16, 1, False),
        (17, 16, 1, True),
        (64, 16, 4, False),
        (65, 16, 4, True),
        (4096, 1_281_167, 1, False),
    ],
)
def test_a_step_that_sees_an_image_twice_is_a_warning(batch, images, repeat, warns):
    text = describe_repeats(batch, images, repeat=repeat)
    assert bool(text) == warns and (not warns or f"optim.global_batch {batch}" in text)


@pytest.mark.parametrize(
    "key, value",
    [
        ("optim.epochs", ".inf"),
        ("optim.epochs", "inf"),
        ("optim.epochs", "1e999"),
        ("optim.base_lr", ".nan"),
        ("optim.base_lr", "Infinity"),
        ("checkpoint.every_minutes", ".inf"),
        ("eval.knn_every", "inf"),
        ("data.timeout_s", "inf"),
        ("dist.timeout_s", "1e12"),
        ("data.crop_scale", "[.nan, 1]"),
    ],
)
def test_numbers_are_finite(key, value):
    with refused(key):
        load_config("mae_vit_base", [f"{key}={value}"])
