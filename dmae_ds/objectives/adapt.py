"""A released backbone continues on other images under a larger one, without forgetting what it knew.

The loss is that of `features`, and a Gram anchor: the cosines between the patches of an image stay near those
that the initial student gives (DINOv3, its Gram loss, with the initial student in the place of an earlier
teacher). The anchor is a frozen copy of the student, whole on every rank and in the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.adapt import AdaptConfig
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.align import at_least_float32
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.objectives.features import Features, FeaturesBatch
from dmae_ds.objectives.needs import EmaSpec


class Adapt(Features):
    """`Features`, with a frozen copy of the initial student as its anchor."""

    def __init__(
        self,
        config: AdaptConfig,
        *,
        student: MaskedViT,
        teachers: dict[str, TeacherShape],
        generator: torch.Generator,
    ):
        super().__init__(config, student=student, teachers=teachers, generator=generator)
        self.ema = EmaSpec(parts=("student",), every="never")

    def describe(self) -> str:
        return f"{super().describe()}; Gram anchor to the initial student, weight {self.config.anchor:g}"

    def ema_features(self, ema: nn.Module, batch: FeaturesBatch) -> dict[str, Tensor]:
        """Return {"ema/patches": [N, K, D]}, the initial student's patches after its final norm."""
        return {"ema/patches": ema.student(batch.own, batch.ids_keep)[0][:, self.student.num_cls :]}

    def more_terms(self, latent: Tensor, features: dict[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
        """Return {"anchor": (its weight, the Gram distance)}."""
        patches = latent[:, self.student.num_cls :]
        return {"anchor": (self.config.anchor, gram_distance(patches, features["ema/patches"]))}


def gram_distance(patches: Tensor, anchored: Tensor) -> Tensor:
    """Return the mean squared difference between two Gram matrices of unit patches, a scalar.

    patches, anchored: [N, K, D]; the matrices are [N, K, K], the cosines between the patches of an image
    """
    with torch.autocast(patches.device.type, enabled=False):  # bf16 would leave two digits of a cosine
        first, second = (_gram(tokens) for tokens in (patches, anchored))
    return functional.mse_loss(first, second)


def _gram(tokens: Tensor) -> Tensor:
    unit = functional.normalize(at_least_float32(tokens), dim=-1)
    return unit @ unit.transpose(1, 2)
