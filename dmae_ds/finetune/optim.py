"""The two optimisers: AdamW with one rate per layer for fine-tuning, LARS for the linear probe."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay
from torch import nn

from dmae_ds.config.dense import DenseOptimConfig
from dmae_ds.config.evaluation import FinetuneOptimConfig, LinearOptimConfig
from dmae_ds.train.learning_rate import peak_lr


def build_adamw(
    network: VisionTransformer,
    task: nn.Module,
    config: FinetuneOptimConfig | DenseOptimConfig,
    *,
    lr: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over the network's layers, and at the full rate over a task's own parameters (a projection).

    lr: the peak; None: by base_lr and the batch
    """
    groups = layer_groups(network, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    of_network = {id(parameter) for parameter in network.parameters()}
    others = [p for p in task.parameters() if p.requires_grad and id(p) not in of_network]
    for decay, parameters in (
        (config.weight_decay, [p for p in others if p.ndim > 1]),
        (0.0, [p for p in others if p.ndim <= 1]),
    ):
        if parameters:
            groups.append({"params": parameters, "lr_scale": 1.0, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=peak_lr(config) if lr is None else lr, betas=config.betas)


def layer_groups(network: VisionTransformer, *, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups with `lr_scale` = layer_decay^(depth + 1 - layer) (MAE, A.1, after BEiT).

    The groups are made by timm's function.
    Layer 0: tokens, positional embedding, patch projection; i + 1: block i; depth + 1: everything else. timm
    itself counts the final norm to the last block, the published code to the head, and so does this function.
    Weight decay does not apply to 1-D tensors, tokens and positional embeddings.
    """

    def layers(coarse: bool = False) -> dict:
        known = network.group_matcher(coarse=coarse)
        return {**known, "blocks": [rule for rule in known["blocks"] if not rule[0].startswith("^norm")]}

    view = SimpleNamespace(named_parameters=network.named_parameters, group_matcher=layers)
    return param_groups_layer_decay(view, weight_decay, network.no_weight_decay(), layer_decay=layer_decay)


def build_lars(head: nn.Module, config: LinearOptimConfig) -> Lars:
    """timm's LARS as in MAE's probe (You et al. 2017): only tensors of more than one dimension are scaled."""
    scaled, plain = ([p for p in head.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": scaled, "always_adapt": True}, {"params": plain, "always_adapt": False}]
    return Lars(groups, lr=peak_lr(config), momentum=config.momentum, trust_coeff=config.trust)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
