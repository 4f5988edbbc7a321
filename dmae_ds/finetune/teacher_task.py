"""What the distillation tasks of our own share: a student, a frozen classifier, and the labels' loss."""

from __future__ import annotations

import torch
from timm.task import DistillationTeacher
from torch import Tensor, nn


class TeacherTask(nn.Module):
    """A student with a frozen classifier; a subclass adds the losses. The arguments are those of timm.task.

    student: has `forward_features`, `forward_head`, `head`, `num_features`, `pretrained_cfg`, as timm's ViTs
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: DistillationTeacher,
        *,
        criterion: nn.Module,
        task_loss_weight: float,
        distill_loss_weight: float,
        verbose: bool = False,
    ):
        super().__init__()
        self.student, self.teacher, self.criterion = student, teacher, criterion
        self.task_weight, self.weight = task_loss_weight, distill_loss_weight
        for name in ("mean", "std"):
            # [C] -> [1, C, 1, 1]
            statistics = torch.tensor(student.pretrained_cfg[name]).view(1, -1, 1, 1)
            self.register_buffer(f"student_{name}", statistics, persistent=False)

    def pooled_features(self, images: Tensor) -> Tensor:
        """The student's pooled features before its head, [N, D]."""
        return self.student.forward_head(self.student.forward_features(images), pre_logits=True)

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> Tensor:
        """The teacher's pooled features before its head, [N, D_t], of images as the student takes them."""
        seen = self.teacher.normalize_input(images, self.student_mean, self.student_std)
        return self.teacher(seen, return_features=True)
