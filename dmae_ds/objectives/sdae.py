"""SdAE: predict the EMA teacher's features of masked patches (Chen et al., ECCV 2022, Sec. 2).

The student is a masked autoencoder whose decoder predicts features of the encoder's width. Its EMA teacher
sees only the masked patches, in folds about as small as the student's own view, which is cheaper than the
whole image and, in the paper, better (Table 1, Figure 4b).

Chosen here: the EMA teacher starts as a copy of the student (the published script initialises it separately),
and with `momentum_every: step` its momentum follows the run's progress (in the script: the epoch's).
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
    """Student and decoder; the EMA teacher is a copy of the student.

    The first `folds * fold_size` masked patches of an image, in the order of the mask's noise, have targets.
    Raises UserError for more folds than masked patches, and for a cosine over a single token.
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
        sees = {
            "folds": f"{self.folds} folds of {self.fold_size} masked patches",
            "masked": f"all {self.fold_size} masked patches",
            "crop": f"a crop of {self.fold_size} masked patches",
            "all": "the whole image",
        }
        first, last = self.momentum
        return (
            f"{super().describe()}; the EMA teacher sees {sees[self.sees]}, cosine over {self.cosine_over}, "
            f"momentum {first:g} to {last:g}, updated every {self.ema.every}"
        )

    def momentum_at(self, progress: Progress) -> float:
        """Return eta of Eq. 7; updated every epoch, it is constant within the epoch, as published."""
        share = progress.step / progress.num_steps
        if self.ema.every == "epoch":
            share = math.floor(progress.epoch) / progress.epochs
        return half_cosine(*self.momentum, share)

    def ema_features(self, ema: nn.Module, batch: PatchBatch) -> dict[str, Tensor]:
        """Return {"ema/targets": [N, folds * fold_size, D]}, normalised tokens of the last layer (Eq. 3)."""
        if self.sees == "all":
            patches = torch.cat([batch.visible, batch.masked], dim=1)
            ids = torch.cat([batch.ids_keep, batch.ids_masked], dim=1)
            tokens = ema.student(patches, ids)[0][:, self.student.num_cls + self.num_visible :]
        else:
            patches, ids = (
                tensor[:, : self.folds * self.fold_size].unflatten(1, (self.folds, -1)).flatten(0, 1)
                for tensor in (batch.masked, batch.ids_masked)
            )
            # [N * folds, fold_size, D] -> [N, folds * fold_size, D]
            tokens = ema.student(patches, ids)[0][:, self.student.num_cls :]
            tokens = tokens.unflatten(0, (-1, self.folds)).flatten(1, 2)
        return {"ema/targets": standardize_tokens(tokens)}

    def forward(self, batch: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "cosine", "target/spread"}, scalars."""
        targets = features["ema/targets"]
        latent, _ = self.student(batch.visible, batch.ids_keep)
        predicted = self.decoder(latent, batch.ids_keep, batch.ids_masked)[:, : targets.shape[1]]
        cosine = cosine_distance(predicted, targets, over=self.cosine_over, fold_size=self.fold_size)
        return {"loss": cosine, "cosine": cosine.detach(), "target/spread": spread(targets.flatten(0, 1))}


def cut(config: SdaeConfig, num_masked: int) -> tuple[int, int]:
    """Return (number of folds, patches of each) of an image's masked patches, without an incomplete fold."""
    if config.teacher_sees == "folds":
        folds = config.folds or FOLDS
        if folds > num_masked:
            raise UserError(
                f"objective.folds {folds} is above the {num_masked} masked patches of objective.mask_ratio "
                f"{config.mask_ratio:g}; mask more, or take fewer folds"
            )
        size = num_masked // folds
    else:
        folds, size = 1, num_masked
        if config.teacher_sees == "crop":
            size = max(1, round(num_masked * (config.crop_ratio or CROP_RATIO)))
    if config.cosine_over == "tokens" and size == 1:
        raise UserError(
            "objective.cosine_over tokens is over a single token here, whose cosine is 1 or -1 for any "
            "prediction; mask more, take fewer folds, or set objective.cosine_over=channels"
        )
    return folds, size


def standardize_tokens(tokens: Tensor) -> Tensor:
    """Return each token [..., D] minus its mean, over sqrt(unbiased variance + 1e-6) (Eq. 3).

    In float32 or float64.
    """
    tokens = at_least_float32(tokens)
    variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
    return (tokens - mean) / (variance + EPSILON).sqrt()


def cosine_distance(predicted: Tensor, targets: Tensor, *, over: str, fold_size: int) -> Tensor:
    """Return the mean of 1 - cosine, a scalar; predicted and targets are [N, folds * fold_size, D].

    over: `channels`, one cosine a token (Eq. 4); `tokens`, one cosine a fold and channel
    """
    # [N, folds * fold_size, D] -> [N, folds, fold_size, D]
    predicted, targets = (
        at_least_float32(tensor).unflatten(1, (-1, fold_size)) for tensor in (predicted, targets)
    )
    dim = {"channels": -1, "tokens": -2}[over]
    return 1 - functional.cosine_similarity(predicted, targets, dim=dim).mean()
