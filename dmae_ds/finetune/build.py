"""A source -> the classifier to train: network with weights, task, optimiser, and how to write it down."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dmae_ds.config.evaluation import LinearConfig
from dmae_ds.config.run import ModelConfig
from dmae_ds.finetune.linear import LinearProbe
from dmae_ds.finetune.network import (
    build_classifier,
    classifier_keys,
    fill_trunk,
    load_teacher,
    with_distillation_token,
)
from dmae_ds.finetune.optim import build_adamw, build_lars
from dmae_ds.finetune.source import Source
from dmae_ds.finetune.tasks import build_task


@dataclass
class Classifier:
    """What is trained, on its device. network: plain timm or a LinearProbe; model and keys: how timm builds it again; about: for a person."""

    network: nn.Module
    model: ModelConfig
    keys: dict
    img_size: int
    task: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    step: int  # of the student
    about: str

    @property
    def judged(self) -> nn.Module:
        """What is validated and kept: the averaged network where there is one."""
        return self.network if self.ema is None else self.ema.module

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, in timm's names."""
        return self.judged.folded() if isinstance(self.judged, LinearProbe) else self.judged.state_dict()


def build(source: Source, criterion: nn.Module, *, num_classes: int, device: torch.device) -> Classifier:
    """Network with weights, task and optimiser, ready on a device; criterion: the labels' loss. Raises UserError where the weights don't fit."""
    config = source.config
    linear = isinstance(config, LinearConfig)
    keys = classifier_keys(
        config.pool, num_classes, norm_first=linear, drop_path=0.0 if linear else config.drop_path
    )
    network: nn.Module = build_classifier(
        config.network, keys, seed=config.run.seed, mean=config.data.mean, std=config.data.std
    )
    model, img_size = config.network, network.patch_embed.img_size[0]
    if not linear and config.init == "random":
        step, about = 0, "random initial weights"
    else:
        step, about = fill_trunk(network, source.file, config.format, config.network)
    if linear:
        network = LinearProbe(network, seed=config.run.seed).to(device)
        task = build_task(network, criterion, distill=None, teacher=None, seed=config.run.seed, device=device)
        return Classifier(
            network, model, keys, img_size, task, build_lars(network.head, config.optim), None, step, about
        )
    distill, teacher = config.distill, None
    if distill is not None:
        teacher = load_teacher(
            distill, num_classes=num_classes, img_size=img_size, mean=config.data.mean, std=config.data.std
        )
        if distill.method.startswith("deit"):
            network, model = with_distillation_token(network, seed=config.run.seed)
            keys = {"num_classes": num_classes}
    task = build_task(
        network, criterion, distill=distill, teacher=teacher, seed=config.run.seed, device=device
    )
    ema = None if config.ema is None else ModelEmaV3(copy.deepcopy(network), decay=config.ema)
    return Classifier(
        network, model, keys, img_size, task, build_adamw(network, task, config.optim), ema, step, about
    )
