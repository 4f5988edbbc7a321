"""DMAE: pixels, and features that imitate a frozen teacher's at three quarters of the depth (DMAE, Eq. 1-3)."""

from __future__ import annotations

import torch
from torch import Tensor

from dmae_ds.config.objectives import DmaeConfig
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.feature_distillation import (
    FeatureDistillation,
    TeacherShape,
    gradient_shares,
    resolve_pairs,
)
from dmae_ds.objectives.mae import Mae

__all__ = ["Dmae", "TeacherShape", "resolve_pairs"]


class Dmae(Mae):
    """Mae plus one projection head for each aligned pair of blocks."""

    def __init__(
        self, config: DmaeConfig, *, student: MaskedViT, teacher: TeacherShape, generator: torch.Generator
    ):
        super().__init__(config, student=student, generator=generator)
        self.heads = FeatureDistillation(config, student=student, teacher=teacher, generator=generator)
        self.taps, self.pairs = self.heads.taps, self.heads.pairs

    def describe(self) -> str:
        return f"{super().describe()}; {self.heads.describe()}"

    def forward(self, batch: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """features {"block/18": [N, 1 + K, D_t], ...}, or [N, K, D_t] of a teacher without CLS, which has no target for the student's.

        Returns {"loss", "pixel", "align/9-18", ...}, scalars.
        """
        latent, tapped = self.student(batch.visible, batch.ids_keep, taps=self.heads.blocks)
        pixel = self.pixel_loss(latent, batch)
        parts = {"pixel": pixel.detach()}
        loss = pixel
        for name, align in self.heads(tapped, features).items():
            loss = loss + self.heads.alpha * align  # Eq. 3: L = L_MAE + alpha * L_Dist
            parts[name] = align.detach()
        return {"loss": loss, **parts}

    def gradient_shares(self) -> dict[str, Tensor]:
        return gradient_shares(self.student)
