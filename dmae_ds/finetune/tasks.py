"""Training tasks of classifiers: the labels' loss, alone or with a fine-tuned classifier's (timm.task).

A task maps (images, labels), and for CRD also the samples to contrast with, to {"loss": scalar, "output":
logits, named parts}. A teacher stays in eval mode
and gets no gradients.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
)
from torch import Tensor, nn

from dmae_ds.config.evaluation import DistillConfig
from dmae_ds.finetune.contrast import Contrast
from dmae_ds.finetune.crd import CrdTask
from dmae_ds.finetune.srrl import SrrlTask

TASKS = {
    # DeiT, Sec. 4, Eq. 2: KL divergence at a temperature, on the head of the distillation token
    "deit_soft": lambda config: (
        TokenDistillationTask,
        {"distill_type": "soft", "temperature": config.temperature},
    ),
    # Eq. 3: the teacher's decision as a label
    "deit_hard": lambda config: (TokenDistillationTask, {"distill_type": "hard"}),
    # Hinton et al. 2015
    "logits": lambda config: (LogitDistillationTask, {"temperature": config.temperature}),
    # Squared error of the pooled features before the head, after a linear map if the widths differ
    "features": lambda config: (FeatureDistillationTask, {}),
    "crd": lambda config: (CrdTask, {"config": config.crd}),
    "srrl": lambda config: (SrrlTask, {"config": config.srrl}),
}


def build_task(
    network: nn.Module,
    criterion: nn.Module,
    *,
    distill: DistillConfig | None,
    teacher: VisionTransformer | None,
    seed: int,
    device: torch.device,
    contrast: Contrast | None = None,
) -> nn.Module:
    """Build the module to train, from a network, the labels' loss and a teacher if `distill` is given.

    contrast: the training images from which CRD draws, for method crd alone
    Its trainable parameters are the network's and those of the method's maps (a projection of features of
    another width, CRD's embeddings, SRRL's connector), whose initial weights are drawn from `seed`.
    """
    if distill is None:
        return ClassificationTask(network, criterion, device=device, verbose=False).to(device)
    task_class, kwargs = TASKS[distill.method](distill)
    if distill.method == "crd":
        kwargs["contrast"] = contrast
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Built on the CPU, so that a projection is the same on every device.
        task = task_class(
            network.cpu(),
            _Teacher(teacher.cpu()),
            criterion=criterion,
            distill_loss_weight=distill.weight,
            task_loss_weight=distill.task_weight,
            verbose=False,
            **kwargs,
        )
    task.teacher.compare(task.student_mean, task.student_std)
    task.teacher.requires_grad_(False)
    return task.to(device)


class _Teacher(DistillationTeacher):
    """timm's teacher, which compares its statistics of pixels with the student's once.

    timm compares them on the device at each micro-batch, and waits for it twice.
    """

    def compare(self, student_mean: Tensor, student_std: Tensor) -> None:
        """Note whether both networks take the same images. Call it on the CPU."""
        self._is_alike = torch.equal(student_mean, self.mean_kd) and torch.equal(student_std, self.std_kd)

    def normalize_input(self, images: Tensor, student_mean: Tensor, student_std: Tensor) -> Tensor:
        """Return images that are normalised for the student as the teacher takes them."""
        if self._is_alike:
            return images
        return (images * student_std + student_mean - self.mean_kd) / self.std_kd


def set_training(task: nn.Module) -> None:
    """Set training mode for all but the teacher (timm's tasks do this only in versions after 1.0.26)."""
    task.train()
    teacher = getattr(task, "teacher", None)
    if teacher is not None:
        teacher.eval()
