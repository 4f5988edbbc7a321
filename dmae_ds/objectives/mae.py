"""Masked autoencoding: predict the pixels of masked patches (MAE, Sec. 3; DMAE, Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmae_ds.config.objectives import MaskedPixels
from dmae_ds.models.decoder import Decoder
from dmae_ds.models.masking import MaskedBatch, gather_patches, keep_random, num_visible
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT


class Mae(nn.Module):
    """Student and decoder under the pixel loss.

    student: built by `models.vit.build_student`; `generator` draws the decoder's initial weights.
    Raises UserError when the mask would leave no visible or no masked patch.
    """

    taps: tuple[str, ...] = ()

    def __init__(self, config: MaskedPixels, *, student: MaskedViT, generator: torch.Generator):
        super().__init__()
        self.num_visible = num_visible(student.num_patches, config.mask_ratio, config.patch_count)
        self.norm_pix = config.norm_pix
        self.student = student
        self.decoder = Decoder(
            encoder_dim=student.embed_dim, patch_size=student.patch_size, grid=student.grid, depth=config.decoder.depth,
            embed_dim=config.decoder.embed_dim, num_heads=config.decoder.num_heads, generator=generator,
        )  # fmt: skip

    def prepare(self, images: Tensor, noise: Tensor, normalize: nn.Module, *, num_visible: int | None = None) -> MaskedBatch:
        """Draw the mask. images [N, 3, H, W] as read (uint8), noise [N, L]; `normalize` turns pixels into floats.

        num_visible: patches that stay, where it is not the recipe's mask ratio that says so
        """
        patches = patchify(images, self.student.patch_size)
        ids_keep, ids_masked = keep_random(noise, num_visible or self.num_visible)
        visible, masked = (normalize(gather_patches(patches, ids)) for ids in (ids_keep, ids_masked))
        return MaskedBatch(visible=visible, masked=masked, ids_keep=ids_keep, ids_masked=ids_masked)

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self.num_visible} of {self.student.num_patches} patches visible{', norm_pix' if self.norm_pix else ''}"

    def gradient_shares(self) -> dict[str, Tensor]:
        """After backward: {"share/9": norm of distillation's gradient at student block 9 / (that + norm of the rest's)}.

        A share near 0 is a dead term. Here no block is distilled.
        """
        return {}

    def forward(self, batch: MaskedBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns {"loss", "pixel"}, scalars."""
        latent, _ = self.student(batch.visible, batch.ids_keep)
        pixel = self.pixel_loss(latent, batch)
        return {"loss": pixel, "pixel": pixel.detach()}

    def pixel_loss(self, latent: Tensor, batch: MaskedBatch) -> Tensor:
        """Mean squared error over the pixels of masked patches (Eq. 1)."""
        predicted = self.decoder(latent, batch.ids_keep, batch.ids_masked)
        target = normalize_patches(batch.masked) if self.norm_pix else batch.masked
        return nn.functional.mse_loss(predicted.float(), target)


def normalize_patches(patches: Tensor) -> Tensor:
    """`norm_pix`: each patch [..., P, P, C] minus its mean, over sqrt(unbiased variance + 1e-6) (MAE, Sec. 3)."""
    variance, mean = torch.var_mean(patches, dim=(-3, -2, -1), keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
