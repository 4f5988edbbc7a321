"""SdAE: predict the features of masked patches, as an average of the student's own past weights sees them (Chen et al., ECCV 2022, Sec. 2).

The student is a masked autoencoder whose decoder predicts features in the encoder's width. Its EMA teacher never sees what the
student sees: masked patches alone, cut into folds about as small as the student's own view, which is both cheaper than
the whole picture and, in the paper, better (Table 1, Figure 4b).

Chosen here: the EMA teacher starts as a copy of the student (the published script draws it anew), and once a step its momentum
follows the run's progress (there: the epoch's).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.objectives import SdaeConfig
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.align import at_least_float32
from dmae_ds.objectives.masked import MaskedObjective, build_decoder
from dmae_ds.objectives.needs import EmaSpec, Progress
from dmae_ds.objectives.schedule import half_cosine
from dmae_ds.objectives.spread import spread

FOLDS, CROP_RATIO, EPSILON = 3, 1 / 3, 1e-6


class Sdae(MaskedObjective):
    """Student and decoder; the EMA teacher is of the student alone.

    Of a picture's masked patches, in the order of the mask's noise, the first `folds * fold_size` have targets.
    Raises UserError for more folds than masked patches, and where a cosine would be taken over a single token.
    """

    def __init__(self, config: SdaeConfig, *, student: MaskedViT, generator: torch.Generator):
        super().__init__(config, student=student)
        self.sees, self.cosine_over = config.teacher_sees, config.cosine_over
        self.folds, self.fold_size = cut(config, student.num_patches - self.num_visible)
        self.decoder = build_decoder(
            config.decoder, student=student, generator=generator, feature_dim=student.embed_dim
        )
        self.momentum = config.momentum
        self.ema = EmaSpec(parts=("student",), momentum=self.momentum_at, every=config.momentum_every)

    def describe(self) -> str:
        seen = {
            "folds": f"{self.folds} folds of {self.fold_size}",
            "masked": f"all {self.fold_size}",
            "crop": f"a crop of {self.fold_size}",
        }
        sees = f"{seen[self.sees]} masked patches" if self.sees in seen else "the whole picture"
        first, last = self.momentum
        return f"{super().describe()}; the EMA teacher sees {sees}, cosine over {self.cosine_over}, momentum {first:g} to {last:g} once a{'n' if self.ema.every == 'epoch' else ''} {self.ema.every}"

    def momentum_at(self, progress: Progress) -> float:
        """Eq. 7's eta; once an epoch it is constant within the epoch, as published."""
        share = (
            math.floor(progress.epoch) / progress.epochs
            if self.ema.every == "epoch"
            else progress.step / progress.num_steps
        )
        return half_cosine(*self.momentum, share)

    def ema_features(self, ema: nn.Module, batch: PatchBatch) -> dict[str, Tensor]:
        """{"ema/targets": [N, folds * fold_size, D]}: each token after the final norm, normalised over channels (Eq. 3)."""
        if self.sees == "all":
            patches, ids = (
                torch.cat([batch.visible, batch.masked], dim=1),
                torch.cat([batch.ids_keep, batch.ids_masked], dim=1),
            )
            tokens = ema.student(patches, ids)[0][:, 1 + self.num_visible :]
        else:
            patches, ids = (
                tensor[:, : self.folds * self.fold_size].unflatten(1, (self.folds, -1)).flatten(0, 1)
                for tensor in (batch.masked, batch.ids_masked)
            )
            # [N * folds, 1 + fold_size, D] -> [N, folds * fold_size, D]
            tokens = ema.student(patches, ids)[0][:, 1:].unflatten(0, (-1, self.folds)).flatten(1, 2)
        return {"ema/targets": standardize_tokens(tokens)}

    def forward(self, batch: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns {"loss", "cosine", "target/spread"}, scalars."""
        targets = features["ema/targets"]
        latent, _ = self.student(batch.visible, batch.ids_keep)
        predicted = self.decoder(latent, batch.ids_keep, batch.ids_masked)[:, : targets.shape[1]]
        cosine = cosine_distance(predicted, targets, over=self.cosine_over, fold_size=self.fold_size)
        return {"loss": cosine, "cosine": cosine.detach(), "target/spread": spread(targets.flatten(0, 1))}


def cut(config: SdaeConfig, num_masked: int) -> tuple[int, int]:
    """(folds, patches of each) that have targets, of a picture's masked patches; what doesn't fill a fold is dropped."""
    if config.teacher_sees == "folds":
        folds = config.folds or FOLDS
        if folds > num_masked:
            raise UserError(
                f"objective.folds {folds} is above the {num_masked} masked patches of objective.mask_ratio {config.mask_ratio:g}; mask more, or take fewer folds"
            )
        size = num_masked // folds
    else:
        ratio = config.crop_ratio or CROP_RATIO
        folds, size = 1, max(1, round(num_masked * ratio)) if config.teacher_sees == "crop" else num_masked
    if config.cosine_over == "tokens" and size == 1:
        raise UserError(
            "objective.cosine_over tokens has a single token to go over here, whose cosine is 1 or -1 whatever is predicted; mask more, take fewer folds, or cosine_over channels"
        )
    return folds, size


def standardize_tokens(tokens: Tensor) -> Tensor:
    """Each token [..., D] minus its mean, over sqrt(unbiased variance + 1e-6) (Eq. 3), in float32 at least."""
    tokens = at_least_float32(tokens)
    variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
    return (tokens - mean) / (variance + EPSILON).sqrt()


def cosine_distance(predicted: Tensor, targets: Tensor, *, over: str, fold_size: int) -> Tensor:
    """1 - cosine, a scalar; both [N, folds * fold_size, D].

    over: `channels`, the mean over tokens (Eq. 4); `tokens`, the mean over folds and channels of what two columns of a fold are apart
    """
    # [N, folds * fold_size, D] -> [N, folds, fold_size, D]
    predicted, targets = (
        at_least_float32(tensor).unflatten(1, (-1, fold_size)) for tensor in (predicted, targets)
    )
    return (
        1 - functional.cosine_similarity(predicted, targets, dim={"channels": -1, "tokens": -2}[over]).mean()
    )
