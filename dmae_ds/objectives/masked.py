"""Base class of objectives that mask patches and have a decoder predict something of the masked ones."""

from __future__ import annotations

import torch
from torch import nn

from dmae_ds.config.objectives import DecoderConfig, MaskedPatches
from dmae_ds.data.batch import Batch
from dmae_ds.models.decoder import Decoder
from dmae_ds.models.masking import PatchBatch, gather_patches, keep_random, num_visible
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import Objective


class MaskedObjective(Objective):
    """An objective whose student sees `num_visible` patches of every image.

    student: built by `models.vit.build_student`
    Raises UserError where the mask would leave no visible or no masked patch.
    """

    def __init__(self, config: MaskedPatches, *, student: MaskedViT):
        super().__init__(student)
        self.mask_ratio, self.patch_count = config.mask_ratio, config.patch_count
        self.num_visible = self.visible_at(config.mask_ratio)

    @property
    def shown(self) -> tuple[object, ...] | None:
        """The first patches in the order of the noise; a subclass may prepare others."""
        is_own = type(self).prepare is MaskedObjective.prepare
        return random_patches(self.num_visible) if is_own else None

    def visible_at(self, mask_ratio: float) -> int:
        """Return how many patches stay visible at a mask ratio, rounded by the recipe's `patch_count`."""
        return num_visible(self.student.num_patches, mask_ratio, self.patch_count)

    def prepare(self, batch: Batch, normalize: nn.Module, *, num_visible: int | None = None) -> PatchBatch:
        """Return the batch with its mask drawn from the batch's noise.

        num_visible: patches that stay; None: as many as the recipe's mask ratio leaves
        """
        patches = patchify(batch.images, self.student.patch_size)
        ids_keep, ids_masked = keep_random(batch.noise, num_visible or self.num_visible)
        visible, masked = (normalize(gather_patches(patches, ids)) for ids in (ids_keep, ids_masked))
        return PatchBatch(visible=visible, masked=masked, ids_keep=ids_keep, ids_masked=ids_masked)

    def describe(self) -> str:
        return f"{self.num_visible} of {self.student.num_patches} patches visible"


def random_patches(num_visible: int) -> tuple[object, ...]:
    """Return the value of `shown` of the first patches in the order of the noise."""
    return "random", num_visible


def build_decoder(
    config: DecoderConfig, *, student: MaskedViT, generator: torch.Generator, feature_dim: int | None = None
) -> Decoder:
    """Return the decoder of a student, which predicts pixels or `feature_dim` numbers a patch.

    `generator` draws its initial weights.
    """
    return Decoder(
        encoder_dim=student.embed_dim,
        patch_size=student.patch_size,
        grid=student.grid,
        depth=config.depth,
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        generator=generator,
        feature_dim=feature_dim,
        channels=student.channels,
    )
