"""The learning rate of each step (MAE, A.1), and whether a run's steps can change anything (no torch)."""

from __future__ import annotations

import math

from dmae_ds.config.run import ScheduleConfig
from dmae_ds.errors import UserError

LARGEST = 1e36  # fp32 ends at 3.4e38, and Adam's first step divides the rate by 1 - beta1


def peak_lr(config: ScheduleConfig) -> float:
    """Learning rate after warm-up: base_lr * global_batch / 256 (MAE, A.1)."""
    return config.base_lr * config.global_batch / 256


def learning_rate(config: ScheduleConfig, epoch: float) -> float:
    """Learning rate at a fractional epoch: linear warm-up from 0, then half a cosine to min_lr (MAE, A.1)."""
    peak = peak_lr(config)
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def check_rates(config: ScheduleConfig, *, num_steps: int, num_images: int) -> None:
    """Raise UserError where nothing would be learned: the learning rate is 0 in every step, or overflows.

    num_images: images of an epoch
    """
    if peak_lr(config) > LARGEST:
        raise UserError(
            f"optim.base_lr {config.base_lr:g} x optim.global_batch {config.global_batch} / 256 is a rate "
            "that fp32 does not hold; choose a smaller optim.base_lr"
        )
    rates = (learning_rate(config, step * config.global_batch / num_images) for step in range(num_steps))
    if any(rate > 0 for rate in rates):
        return
    steps = "1 step" if num_steps == 1 else f"{num_steps} steps"
    raise UserError(
        f"optim.epochs {config.epochs:g} of {num_images:,} images in batches of optim.global_batch "
        f"{config.global_batch} is {steps} with learning rate 0, by optim.warmup_epochs "
        f"{config.warmup_epochs:g} that begin at 0; choose a smaller optim.global_batch or more epochs"
    )


def describe_repeats(global_batch: int, num_images: int, *, repeat: int = 1) -> str:
    """A warning where a step sees an image more often than `repeat` times; empty where none does."""
    if global_batch <= num_images * repeat:
        return ""
    return (
        f"each step sees images more than once: optim.global_batch {global_batch} is more than the "
        f"{num_images:,} images of data.train"
    )
