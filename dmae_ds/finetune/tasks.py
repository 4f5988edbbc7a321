"""What is minimised: the labels' loss, alone or beside a fine-tuned classifier's, all of them timm.task's.

A task maps (images, labels) to {"loss": scalar, "output": logits, named parts}. A teacher stays in eval mode without gradients.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
)
from torch import nn

from dmae_ds.config.evaluation import DistillConfig

TASKS = {
    # DeiT, Sec. 4, Eq. 2: KL at a temperature, through the second token's head
    "deit_soft": lambda config: (
        TokenDistillationTask,
        {"distill_type": "soft", "temperature": config.temperature},
    ),
    # Eq. 3: the teacher's decision as a label
    "deit_hard": lambda config: (TokenDistillationTask, {"distill_type": "hard"}),
    # Hinton et al. 2015
    "logits": lambda config: (LogitDistillationTask, {"temperature": config.temperature}),
    # squared error of the pooled features before the head, behind a linear map where the widths differ
    "features": lambda config: (FeatureDistillationTask, {}),
}


def build_task(
    network: nn.Module,
    criterion: nn.Module,
    *,
    distill: DistillConfig | None,
    teacher: VisionTransformer | None,
    seed: int,
    device: torch.device,
) -> nn.Module:
    """The module to train: its trainable parameters are the network's and, for features of other width, a projection's.

    The projection's initial weights are drawn from `seed`.
    """
    if distill is None:
        return ClassificationTask(network, criterion, device=device, verbose=False).to(device)
    task, keys = TASKS[distill.method](distill)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # built on the CPU, so that a projection is the same on every device
        built = task(
            network.cpu(),
            teacher.cpu(),
            criterion=criterion,
            distill_loss_weight=distill.weight,
            task_loss_weight=distill.task_weight,
            verbose=False,
            **keys,
        )
    built.teacher.requires_grad_(False)
    return built.to(device)


def set_training(task: nn.Module) -> None:
    """Training mode for all but the teacher (timm's own tasks see to it only in later versions than 1.0.26)."""
    task.train()
    teacher = getattr(task, "teacher", None)
    if teacher is not None:
        teacher.eval()
