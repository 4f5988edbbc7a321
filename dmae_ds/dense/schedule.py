"""The learning rate of each step, and the steps at which a training is saved and scored (no torch).

As in the published segmentation and detection code, the fall is over the whole training, warm-up included,
and warm-up multiplies it.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from dmae_ds.config.dense import DenseOptimConfig
from dmae_ds.data.order import num_steps
from dmae_ds.errors import UserError

STEP_FACTOR = 0.1  # at each milestone


def learning_rate(optim: DenseOptimConfig, step: int, total: int) -> float:
    """Learning rate of the step after `step` finished ones, of `total`."""
    progress = step / total
    if optim.decay == "steps":
        rate = optim.lr * STEP_FACTOR ** bisect_right(optim.milestones, progress)
    else:
        share = 1 - progress if optim.decay == "poly" else 0.5 * (1 + math.cos(math.pi * progress))
        rate = optim.min_lr + (optim.lr - optim.min_lr) * share
    return rate * min(1.0, step / optim.warmup_steps) if optim.warmup_steps else rate


def total_steps(optim: DenseOptimConfig, num_images: int) -> int:
    """Steps of the training. Raises UserError where it ends before its warm-up."""
    total = _steps_in(optim.length, optim, num_images)
    if optim.warmup_steps >= total:
        raise UserError(
            f"optim.warmup_steps {optim.warmup_steps} is not below the {total} steps of the training "
            f"(optim.length {optim.length:g} {optim.unit}); shorten the warm-up or train longer"
        )
    return total


def points(every: float, optim: DenseOptimConfig, num_images: int) -> set[int]:
    """Numbers of finished steps at which `every` has passed again; the last step is always one of them."""
    total = total_steps(optim, num_images)
    times = range(1, math.floor(optim.length / every) + 1)
    return {min(total, _steps_in(number * every, optim, num_images)) for number in times} | {total}


def _steps_in(amount: float, optim: DenseOptimConfig, num_images: int) -> int:
    if optim.unit == "steps":
        return math.ceil(amount)
    return num_steps(amount, num_images, optim.global_batch)
