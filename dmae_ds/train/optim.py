"""AdamW as MAE uses it: its weight-decay groups, and layer-wise decay on request."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from dmae_ds.config.run import OptimConfig
from dmae_ds.errors import UserError
from dmae_ds.objectives.base import Objective
from dmae_ds.train.learning_rate import peak_lr


def build_optimizer(objective: Objective, config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW without weight decay on 1-D tensors and biases; tokens do decay (MAE's published groups).

    The learning rate is set before every step, see `learning_rate.py` and `Engine.set_lr`. Raises
    UserError for a layer decay where the objective has no layers.
    """
    groups = parameter_groups(objective, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    return torch.optim.AdamW(groups, lr=peak_lr(config), betas=config.betas, fused=True)


def parameter_groups(objective: Objective, *, weight_decay: float, layer_decay: float) -> list[dict]:
    """timm's parameter groups, divided further by the objective's `lr_scales`.

    A group has `lr_scale` = layer_decay^(top - layer) where that is not 1, and `scaled_by` = the key of
    `lr_scales` that its parameters' names begin with.
    """
    if layer_decay == 1:
        groups = param_groups_weight_decay(
            objective, weight_decay=weight_decay, no_weight_decay_list=objective.no_weight_decay
        )
    else:
        groups = _layer_groups(objective, weight_decay=weight_decay, layer_decay=layer_decay)
    if not objective.lr_scales:
        return groups
    prefix_of = {
        id(parameter): next((prefix for prefix in objective.lr_scales if name.startswith(prefix)), None)
        for name, parameter in objective.named_parameters()
    }
    divided = []
    for group in groups:
        for prefix in (None, *objective.lr_scales):
            parameters = [parameter for parameter in group["params"] if prefix_of[id(parameter)] == prefix]
            if parameters:
                scaled_by = {} if prefix is None else {"scaled_by": prefix}
                divided.append({**group, "params": parameters, **scaled_by})
    return divided


def _layer_groups(objective: Objective, *, weight_decay: float, layer_decay: float) -> list[dict]:
    layers = {name: objective.layer_of(name) for name, _ in objective.named_parameters()}
    top = max((layer for layer in layers.values() if layer is not None), default=None)
    if top is None:
        raise UserError(
            f"optim.layer_decay {layer_decay:g} requires an objective with layers, and this one has none; "
            "set optim.layer_decay=1"
        )
    view = SimpleNamespace(
        named_parameters=objective.named_parameters,
        group_matcher=lambda coarse: lambda name: top if layers[name] is None else layers[name],
    )
    return param_groups_layer_decay(view, weight_decay, objective.no_weight_decay, layer_decay=layer_decay)
