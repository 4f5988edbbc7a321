"""The two optimisers: AdamW with one rate a layer for fine-tuning, LARS for the linear probe."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay
from torch import nn

from dmae_ds.config.evaluation import FinetuneOptimConfig, LinearOptimConfig
from dmae_ds.train.optim import peak_lr


def build_adamw(
    network: VisionTransformer, task: nn.Module, config: FinetuneOptimConfig
) -> torch.optim.AdamW:
    """AdamW over the network's layers, and over what a task trains beside it (a projection), at the full rate."""
    groups = layer_groups(network, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    inside = {id(parameter) for parameter in network.parameters()}
    beside = [
        parameter
        for parameter in task.parameters()
        if parameter.requires_grad and id(parameter) not in inside
    ]
    for decay, parameters in (
        (config.weight_decay, [p for p in beside if p.ndim > 1]),
        (0.0, [p for p in beside if p.ndim <= 1]),
    ):
        groups += [{"params": parameters, "lr_scale": 1.0, "weight_decay": decay}] if parameters else []
    return torch.optim.AdamW(groups, lr=peak_lr(config), betas=config.betas)


def layer_groups(network: VisionTransformer, *, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups with `lr_scale` = layer_decay^(depth + 1 - layer) (MAE, A.1, after BEiT), by timm's function.

    Layer 0: tokens, position codes, patch projection; i + 1: block i; depth + 1: all the rest. timm itself counts the
    final norm to the last block, the published code to the head. 1-D tensors, tokens and positions don't decay.
    """

    def layers(coarse: bool = False) -> dict:
        known = network.group_matcher(coarse=coarse)
        return {**known, "blocks": [rule for rule in known["blocks"] if not rule[0].startswith("^norm")]}

    view = SimpleNamespace(named_parameters=network.named_parameters, group_matcher=layers)
    return param_groups_layer_decay(view, weight_decay, network.no_weight_decay(), layer_decay=layer_decay)


def build_lars(head: nn.Module, config: LinearOptimConfig) -> Lars:
    """LARS as MAE's probe has it (You et al. 2017), timm's: only tensors of more than one dimension are scaled."""
    scaled, plain = ([p for p in head.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": scaled, "always_adapt": True}, {"params": plain, "always_adapt": False}]
    return Lars(groups, lr=peak_lr(config), momentum=config.momentum, trust_coeff=config.trust)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
