"""DMAE: pixels, and features that imitate a frozen teacher's at 3/4 of the depth (DMAE, Eq. 1-3)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmae_ds.config.objectives import DmaeConfig
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.feature_distillation import FeatureDistillation, TeacherShape
from dmae_ds.objectives.mae import Mae


class Dmae(Mae):
    """MAE plus feature distillation: one projection head for each distilled pair of blocks."""

    def __init__(
        self, config: DmaeConfig, *, student: MaskedViT, teacher: TeacherShape, generator: torch.Generator
    ):
        super().__init__(config, student=student, generator=generator)
        self.heads = FeatureDistillation(config, student=student, teacher=teacher, generator=generator)
        self.taps, self.pairs = self.heads.taps, self.heads.pairs

    def describe(self) -> str:
        return "; ".join([super().describe(), *self.heads.describe()])

    def forward(self, batch: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "pixel", "align/9-18", ...}, scalars.

        features: {"block/18": [N, 1 + K, D_t], ...}; [N, K, D_t] of a teacher without CLS
        """
        latent, tapped = self.student(batch.visible, batch.ids_keep, taps=self.heads.blocks)
        pixel = self.pixel_loss(latent, batch)
        loss, parts = self.heads.add_to(pixel, tapped, features)
        return {"loss": loss, "pixel": pixel.detach(), **parts}
