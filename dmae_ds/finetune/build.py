"""The classifier of a source: network with weights, task, optimiser, and the tensors that are saved."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dmae_ds.config.evaluation import LinearConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.finetune.contrast import Contrast
from dmae_ds.finetune.linear import LinearProbe
from dmae_ds.finetune.network import (
    build_classifier,
    classifier_kwargs,
    fill_trunk,
    is_eva,
    load_teacher,
    with_distillation_token,
)
from dmae_ds.finetune.optim import build_adamw, build_lars
from dmae_ds.finetune.source import Source
from dmae_ds.finetune.tasks import build_task


@dataclass
class Classifier:
    """A classifier in training, on its device.

    network: plain timm or a LinearProbe; model, kwargs: the arguments with which timm builds it again
    step: of the student; note: on its weights, for a person
    """

    network: nn.Module
    model: ModelConfig
    kwargs: dict
    img_size: int
    task: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    step: int
    note: str

    @property
    def judged(self) -> nn.Module:
        """The network that is validated and saved: the averaged one if there is one."""
        return self.network if self.ema is None else self.ema.module

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, in timm's names."""
        return self.judged.folded() if isinstance(self.judged, LinearProbe) else self.judged.state_dict()


def build(
    source: Source,
    criterion: nn.Module,
    *,
    num_classes: int,
    device: torch.device,
    contrast: Contrast | None = None,
) -> Classifier:
    """Build a network with weights, its task and its optimiser on a device.

    criterion: the labels' loss; contrast: the training images from which CRD draws, None for other tasks
    Raises UserError for weights that do not fit.
    """
    config = source.config
    seed, mean, std = config.run.seed, config.data.mean, config.data.std
    linear = isinstance(config, LinearConfig)
    kwargs = classifier_kwargs(
        config.pool,
        num_classes,
        norm_first=linear and not is_eva(config.network),
        drop_path=0.0 if linear else config.drop_path,
    )
    network: nn.Module = build_classifier(config.network, kwargs, seed=seed, mean=mean, std=std)
    model, img_size = config.network, network.patch_embed.img_size[0]
    if not linear and config.init == "random":
        step, note = 0, "random initial weights"
    else:
        step, note = fill_trunk(network, source.file, config.format, config.network)
    if linear:
        network = LinearProbe(network, seed=seed).to(device)
        task = build_task(network, criterion, distill=None, teacher=None, seed=seed, device=device)
        optimizer, ema = build_lars(network.head, config.optim), None
    else:
        distill, teacher = config.distill, None
        if distill is not None:
            teacher = load_teacher(distill, num_classes=num_classes, img_size=img_size, mean=mean, std=std)
            if distill.method.startswith("deit"):
                network, model = with_distillation_token(network, seed=seed)
                kwargs = {"num_classes": num_classes}
        task = build_task(
            network,
            criterion,
            distill=distill,
            teacher=teacher,
            seed=seed,
            device=device,
            contrast=contrast,
        )
        ema = None if config.ema is None else ModelEmaV3(copy.deepcopy(network), decay=config.ema)
        optimizer = build_adamw(network, task, config.optim)
    return Classifier(network, model, kwargs, img_size, task, optimizer, ema, step, note)
