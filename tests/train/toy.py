"""An objective that asks for everything an objective may ask for: one class and one recipe (toy.yaml).

It is written as somebody outside this project would write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.objectives import ObjectiveSection
from dmae_ds.distributed import collectives
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import initialize_as_mae
from dmae_ds.objectives.base import Objective, all_places, freeze, with_zero_gradient
from dmae_ds.objectives.needs import EmaSpec, Progress, View

SMALL = 24  # px
HELD_STEPS = 3  # at the start, in which the classifier does not change


@dataclass
class ToyBatch(PatchBatch):
    small: Tensor
    labels: Tensor


class Holdable(nn.Linear):
    """A linear layer that can be held constant.

    Its weights are used in its own forward: elsewhere ZeRO-3 has them in pieces.
    """

    held = False

    def forward(self, rows: Tensor) -> Tensor:
        weight, bias = (
            with_zero_gradient(parameter) if self.held else parameter
            for parameter in (self.weight, self.bias)
        )
        return functional.linear(rows, weight, bias)


class Toy(Objective):
    """Uses a teacher's block, an EMA teacher with state, a small view, labels, a held and a frozen layer."""

    class Config(ObjectiveSection):
        needs_teacher = True
        needs_labels = True
        name: Literal["tests.train.toy:Toy"]
        every: Literal["step", "epoch"] = "step"

    taps = ("block/3",)
    views = (View(), View(size=SMALL, scale=(0.1, 0.5), photometric="dino2"))
    labels = True

    def __init__(self, config: Config, *, student, teacher, generator, num_classes: int):
        super().__init__(student)
        self.head = nn.Linear(student.embed_dim, 8)
        self.align = nn.Linear(student.embed_dim, teacher.embed_dim)
        self.classes = Holdable(student.embed_dim, num_classes)
        for layer in (self.head, self.align, self.classes):
            initialize_as_mae(layer, generator)
        freeze(student.patch_embed)
        self.ema = EmaSpec(
            ("student", "head"),
            momentum=lambda progress: 0.5 + 0.4 * progress.step / progress.num_steps,
            every=config.every,
        )
        self.lr_scales = {"classes.": 1.0}

    def prepare(self, batch, normalize) -> ToyBatch:
        whole, small = (normalize(patchify(view, self.student.patch_size)) for view in batch.views)
        ids = all_places(len(whole), self.student.grid, whole.device)
        return ToyBatch(
            visible=whole,
            masked=whole[:, :0],
            ids_keep=ids,
            ids_masked=ids[:, :0],
            small=small,
            labels=batch.labels,
        )

    def start_step(self, progress: Progress) -> None:
        self.classes.held = progress.step < HELD_STEPS
        self.sharpness = 1 + progress.epoch
        self.lr_scales["classes."] = 0.0 if self.classes.held else 1.0

    def ema_state(self) -> dict[str, Tensor]:
        return {"centre": torch.zeros(8)}

    def ema_features(self, ema, masked: ToyBatch) -> dict[str, Tensor]:
        projected = ema.head(ema.student(masked.visible, masked.ids_keep)[0][:, 0]).float()
        centred = projected - ema.state["centre"]
        ema.state["centre"].lerp_(collectives.mean_over_ranks(projected.mean(dim=0)), 0.5)
        return {"ema/centred": centred}

    def layer_of(self, name: str) -> int | None:
        words = name.split(".")
        if words[1] == "blocks":
            return int(words[2]) + 1
        return 0 if words[1] == "cls_token" else None

    def forward(self, masked: ToyBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens, tapped = self.student(masked.visible, masked.ids_keep, taps=[3])
        grid = (SMALL // self.student.patch_size,) * 2
        small, _ = self.student(masked.small, all_places(len(tokens), grid, tokens.device), grid=grid)
        losses = {
            "align": functional.l1_loss(self.align(tapped[3]).float(), features["block/3"].float()),
            "views": functional.mse_loss(
                self.sharpness * self.head(small[:, 0]).float(), features["ema/centred"]
            ),
            "labels": functional.cross_entropy(
                self.classes(tokens[:, 1:].mean(dim=1)).float(), masked.labels
            ),
        }
        return {"loss": sum(losses.values()), **{name: loss.detach() for name, loss in losses.items()}}
