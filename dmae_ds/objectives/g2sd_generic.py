"""G2SD's generic stage: a student's decoder imitates a frozen MAE's decoder, with the same mask.

Source: G2SD, and its supplement, Tables 4 and 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.objectives import G2sdGenericConfig
from dmae_ds.errors import UserError
from dmae_ds.models.decoder import TokenDecoder
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT, initialize_as_mae
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.objectives.mae import normalize_patches
from dmae_ds.objectives.masked import MaskedObjective

BETA = 2.0  # of smooth-L1: d^2 / 4 below it, |d| - 1 above


class G2sdGeneric(MaskedObjective):
    """Student, whole decoder without its norm, and a two-layer MLP to the teacher's features or prediction.

    For a reconstruction (Table 4) the paper only tells that the teacher's predictions are the targets at
    masked patches. Here the same MLP ends in a patch's pixels, compared by the same distance; with `pixels`,
    MAE's loss of the same prediction is added.
    """

    def __init__(
        self,
        config: G2sdGenericConfig,
        *,
        student: MaskedViT,
        teacher: TeacherShape,
        generator: torch.Generator,
    ):
        super().__init__(config, student=student)
        self.target, self.norm_pix = config.target, config.norm_pix
        self.decoder = TokenDecoder(
            encoder_dim=student.embed_dim,
            grid=student.grid,
            depth=config.decoder.depth,
            embed_dim=config.decoder.embed_dim,
            num_heads=config.decoder.num_heads,
            generator=generator,
        )
        if self.target == "features":
            block = config.decoder_block or max(1, teacher.decoder_depth // 2)
            if block > teacher.decoder_depth:
                raise UserError(
                    f"objective.decoder_block is {block}, and the teacher's decoder has "
                    f"{teacher.decoder_depth} blocks (teacher.decoder_depth); blocks count from 1"
                )
            self.taps, self.tokens = (f"decoder/{block}",), config.tokens or "all"
            out_dim = teacher.decoder_dim
        else:
            if teacher.patch_size != student.patch_size:
                raise UserError(
                    f"objective.target {self.target} compares pixels, and the teacher's patches are "
                    f"{teacher.patch_size} px wide, the student's {student.patch_size}; give a teacher with "
                    "patches of the same size, or set objective.target=features"
                )
            self.taps, self.tokens = ("prediction",), "masked"
            out_dim = teacher.patch_size**2 * 3
        self.head = nn.Sequential(
            nn.Linear(config.decoder.embed_dim, teacher.decoder_dim),
            nn.GELU(),
            nn.Linear(teacher.decoder_dim, out_dim),
        )
        initialize_as_mae(self.head, generator)

    def describe(self) -> str:
        norm_pix = ", norm_pix" if self.norm_pix else ""
        target = f"{self.tokens} tokens of the decoder <- {self.taps[0]}, target {self.target}{norm_pix}"
        return f"{super().describe()}; {target}"

    def forward(self, batch: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "generic"}, and with pixels "pixel", scalars.

        features: {"decoder/4": [N, 1 + L, D_d]} or {"prediction": [N, L - K, P, P, 3]}
        """
        latent, _ = self.student(batch.visible, batch.ids_keep)
        # [N, 1 + L, D_d]: CLS, visible, masked
        tokens = self.decoder(latent, batch.ids_keep, batch.ids_masked)
        if self.tokens == "masked":
            tokens = tokens[:, latent.shape[1] :]
        predicted = self.head(tokens).float()
        if self.target == "features":
            target = standardized(features[self.taps[0]])[:, -predicted.shape[1] :]
        else:
            target = features["prediction"].flatten(2).float()
        generic = functional.smooth_l1_loss(predicted, target, beta=BETA)
        if self.target != "reconstruction_and_pixels":
            return {"loss": generic, "generic": generic.detach()}
        pixels = normalize_patches(batch.masked) if self.norm_pix else batch.masked
        pixel = functional.mse_loss(predicted, pixels.flatten(2))
        return {"loss": generic + pixel, "generic": generic.detach(), "pixel": pixel.detach()}


def standardized(tokens: Tensor) -> Tensor:
    """Return tokens [..., D] in float32, each with mean 0 and variance 1 over its channels."""
    return functional.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)
