"""Learning rates and points of a dense training: warm-up, decays, steps and epochs."""

from __future__ import annotations

import math

import pytest

from dmae_ds.config.dense import DenseOptimConfig
from dmae_ds.dense.schedule import learning_rate, points, total_steps
from tests.messages import refused

SHORT = {"length": 100, "warmup_steps": 10, "lr": 0.5, "evaluate_every": 30, "save_every": 20}


def rates(total=100, **keys):
    optim = DenseOptimConfig(**{**SHORT, **keys})
    return [learning_rate(optim, step, total) for step in range(total)]


def test_poly_falls_over_the_whole_training_and_warm_up_multiplies_it():
    """mmcv's: the warm-up's share of the rate that the schedule has at that step."""
    actual = rates(min_lr=0.1)
    expected = [(0.1 + 0.4 * (1 - step / 100)) * min(1, step / 10) for step in range(100)]
    assert actual == pytest.approx(expected) and actual[0] == 0 and actual[10] == pytest.approx(0.46)
    assert rates(warmup_steps=0)[0] == 0.5 and rates()[-1] == pytest.approx(0.005)


def test_cosine_and_steps():
    half = rates(decay="cosine", warmup_steps=0)
    assert half == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 100)) for step in range(100)])
    fallen = rates(decay="steps", milestones=(0.6, 0.9), warmup_steps=0)
    assert fallen[59] == 0.5 and fallen[60] == fallen[89] == pytest.approx(0.05)
    assert fallen[90] == pytest.approx(0.005)


def test_points_are_multiples_and_the_end():
    optim = DenseOptimConfig(**SHORT)
    assert total_steps(optim, 7) == 100
    assert points(optim.evaluate_every, optim, 7) == {30, 60, 90, 100}
    assert points(1000.0, optim, 7) == {100}


def test_epochs_are_passes_over_the_images():
    """10 images in batches of 4: epochs end after steps 3, 5, 8 and 10."""
    keys = {**SHORT, "unit": "epochs", "length": 4, "warmup_steps": 2, "global_batch": 4}
    optim = DenseOptimConfig(**keys)
    assert total_steps(optim, 10) == 10
    assert points(1.0, optim, 10) == {3, 5, 8, 10}
    assert points(1.5, optim, 10) == {4, 8, 10}


def test_a_training_that_ends_in_its_warm_up_is_refused():
    with refused("optim.warmup_steps 10", "10 steps", "optim.length 10"):
        total_steps(DenseOptimConfig(**{**SHORT, "length": 10}), 7)


@pytest.mark.parametrize(
    "keys", [{"decay": "steps"}, {"milestones": (0.5,)}, {"decay": "steps", "milestones": (0.9, 0.6)}]
)
def test_milestones_go_with_steps_alone(keys):
    with pytest.raises(ValueError, match="milestones"):
        DenseOptimConfig(**keys)
