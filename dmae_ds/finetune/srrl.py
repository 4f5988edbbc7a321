"""Softmax regression representation learning (SRRL, Yang et al., ICLR 2021).

The student's features are connected to the teacher's width; the pooled ones are compared with the teacher's,
and the teacher's frozen classifier reads them and is compared with its logits.

The published connector is for convolutional networks: 1x1 convolution, batch norm and ReLU on the map, before
pooling. A ViT's pooled features come from a layer norm and may be negative, which a ReLU can't reach. DMAE
does not say what it did; our reading is a linear map and batch norm of the pooled features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmae_ds.config.evaluation import SrrlConfig
from dmae_ds.finetune.teacher_task import TeacherTask


class SrrlTask(TeacherTask):
    """The labels' loss and SRRL's two. Other arguments are TeacherTask's."""

    def __init__(self, student: nn.Module, teacher: nn.Module, *, config: SrrlConfig, **kwargs):
        super().__init__(student, teacher, **kwargs)
        self.config = config
        # On tokens [N, L, D] the linear map is the 1x1 convolution.
        self.connect = nn.Linear(student.num_features, teacher.model.num_features, bias=False)
        self.norm = nn.BatchNorm1d(teacher.model.num_features)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return {"loss", "output", "task_loss", "feature_loss", "logit_loss"} of a micro-batch."""
        network = self.student
        tokens = network.forward_features(images)
        features = network.forward_head(tokens, pre_logits=True)
        logits = network.head(features)
        task_loss = self.criterion(logits, labels)
        with torch.no_grad():
            target = self.teacher_features(images)
            target_logits = self.teacher.model.head(target)
        if self.config.connector == "conv_relu":
            connected = self.connect_tokens(tokens[:, network.num_prefix_tokens :]).mean(1)
        else:
            connected = self.norm(self.connect(features))
        feature_loss = F.mse_loss(connected.float(), target.float())
        # The gradient passes through the teacher's classifier, which is frozen.
        logit_loss = F.mse_loss(self.teacher.model.head(connected).float(), target_logits.float())
        distilled = feature_loss + self.config.logit_weight * logit_loss
        return {
            "loss": self.task_weight * task_loss + self.weight * distilled,
            "output": logits,
            "task_loss": task_loss,
            "feature_loss": feature_loss,
            "logit_loss": logit_loss,
        }

    def connect_tokens(self, tokens: Tensor) -> Tensor:
        """Connect tokens [N, L, D] to [N, L, D_t]; the batch norm's statistics are over images and tokens."""
        # [N, L, D] -> [N * L, D_t] -> [N, L, D_t]
        connected = self.norm(self.connect(tokens).flatten(0, 1))
        return F.relu(connected).unflatten(0, tokens.shape[:2])
