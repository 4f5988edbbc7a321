"""AdamW as MAE uses it: its decay groups and its learning-rate rule."""

from __future__ import annotations

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from dmae_ds.config.run import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW without decay on 1-D tensors and biases; tokens do decay (MAE's published groups, timm's function).

    The learning rate is set before every step, see `learning_rate`.
    """
    groups = param_groups_weight_decay(model, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=peak_lr(config), betas=config.betas, fused=True)


def peak_lr(config: ScheduleConfig) -> float:
    """base_lr * global_batch / 256 (MAE, A.1)."""
    return config.base_lr * config.global_batch / 256


def learning_rate(config: ScheduleConfig, epoch: float) -> float:
    """The rate at a fractional epoch: linear warm-up from 0, then half a cosine to min_lr (MAE, A.1)."""
    peak = peak_lr(config)
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
