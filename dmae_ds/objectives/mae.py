"""Masked autoencoding: predict the pixels of masked patches (MAE, Sec. 3; DMAE, Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmae_ds.config.objectives import MaskedPixels
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.masked import MaskedObjective, build_decoder


class Mae(MaskedObjective):
    """Student and decoder with the pixel loss."""

    reconstructs_pixels = True

    def __init__(self, config: MaskedPixels, *, student: MaskedViT, generator: torch.Generator):
        super().__init__(config, student=student)
        self.norm_pix = config.norm_pix
        self.decoder = build_decoder(config.decoder, student=student, generator=generator)

    def describe(self) -> str:
        return f"{super().describe()}{', norm_pix' if self.norm_pix else ''}"

    def forward(self, batch: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "pixel"}, scalars."""
        latent, _ = self.student(batch.visible, batch.ids_keep)
        pixel = self.pixel_loss(latent, batch)
        return {"loss": pixel, "pixel": pixel.detach()}

    def pixel_loss(self, latent: Tensor, batch: PatchBatch) -> Tensor:
        """Return the mean squared error over the pixels of masked patches (Eq. 1)."""
        predicted = self.decoder(latent, batch.ids_keep, batch.ids_masked)
        target = normalize_patches(batch.masked) if self.norm_pix else batch.masked
        return nn.functional.mse_loss(predicted.float(), target)

    def reconstruct(self, latent: Tensor, batch: PatchBatch) -> Tensor:
        pixels = self.decoder(latent, batch.ids_keep, batch.ids_masked).float()
        if not self.norm_pix:
            return pixels
        # The decoder predicts each patch in units of its own contrast, which only the original knows.
        mean, scale = patch_statistics(batch.masked)
        return pixels * scale + mean


def normalize_patches(patches: Tensor) -> Tensor:
    """Return patches [..., P, P, C], each with mean 0 and variance 1 (norm_pix; MAE, Sec. 3)."""
    mean, scale = patch_statistics(patches)
    return (patches - mean) / scale


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return each patch's mean and its sqrt(unbiased variance + 1e-6), both [..., 1, 1, 1]."""
    variance, mean = torch.var_mean(patches, dim=(-3, -2, -1), keepdim=True)
    return mean, (variance + 1e-6).sqrt()
