"""What every objective is: one module that owns what the optimiser trains, and says in plain values what it needs (needs.py)."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from dmae_ds.data.batch import Batch
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.classifier import Classifier
from dmae_ds.objectives.needs import EmaSpec, Progress, View


class Objective(nn.Module):
    """The declarations with their defaults. A subclass sets what it needs, on the class or in its constructor.

    taps: the frozen teacher's features: "block/18", "decoder/4", "prediction", "logits"; none: no teacher
    views: crops of each picture; the first is `Batch.images`, all are `Batch.views`
    rand_augment: timm's RandAugment, in its notation, on every view; None: none
    labels: whether `Batch.labels` is read; the schema class says the same as `needs_labels`, for which the constructor is given `num_classes`, of the labels
    ema: an EMA copy of some parts
    lr_scales: {prefix of parameter names: factor of the coming step's rate}; such parameters get groups of their own. The keys are
        final once constructed, the values may be set in `start_step`
    no_weight_decay: names of parameters that don't decay, beside those of one dimension
    num_visible: patches of a picture that the student's encoder sees; for the account of a run
    pairs: distilled (student block, teacher block), and reconstructs_pixels: whether `decoder` fills in the pixels of masked patches; for the report
    """

    taps: tuple[str, ...] = ()
    views: tuple[View, ...] = (View(),)
    rand_augment: str | None = None
    labels: bool = False
    num_classes: int | None = None
    ema: EmaSpec | None = None
    no_weight_decay: tuple[str, ...] = ()
    pairs: Sequence[tuple[int, int]] = ()
    reconstructs_pixels: bool = False

    def __init__(self, student: MaskedViT):
        super().__init__()
        self.student = student
        self.num_visible = student.num_patches
        self.lr_scales: dict[str, float] = {}

    def prepare(self, batch: Batch, normalize: nn.Module) -> PatchBatch:
        """The batch on the device -> what teacher, EMA teacher and `forward` share; a subclass of MaskedBatch where that isn't enough.

        A frozen teacher sees `visible` (and `masked`) of it. A pipelined teacher runs ahead of training, so this is called some
        steps early: it must not depend on `start_step`, nor on weights.
        """
        raise NotImplementedError

    def start_step(self, progress: Progress) -> None:
        """Told before every optimiser step, also the first after a resume: for temperatures, frozen layers and other schedules."""

    def ema_features(self, ema: nn.Module, masked: PatchBatch) -> dict[str, Tensor]:
        """What the EMA teacher makes of a micro-batch, under names that begin with "ema/"; merged into `features`. Called without gradients.

        ema: has the parts as attributes, and `state`, the dict of `ema_state`, whose tensors may be updated in place
        """
        raise NotImplementedError

    def ema_state(self) -> dict[str, Tensor]:
        """What the EMA teacher keeps and checkpoints beside its parts, as it starts: DINO's centre."""
        return {}

    def classifier(self) -> Classifier | None:
        """How timm builds the classifier that this objective trains: its accuracy is then measured at the end of a run; None: it trains none."""
        return None

    def layer_of(self, name: str) -> int | None:
        """The layer of a parameter for optim.layer_decay, from 0 (embedding) up; None: of the top group. Where all are None, there are no layers to tell apart."""
        return None

    def forward(self, masked: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns {"loss", and every named part}, scalars, the same names in every step. features: {tap: ...}, and the EMA teacher's.

        Call submodules, don't read their weights: ZeRO-3 puts a parameter together for the forward of the module that owns it alone.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """One line for the start of a run."""
        return ""

    def gradient_shares(self) -> dict[str, Tensor]:
        """After backward: {"share/9": norm of distillation's gradient at student block 9 / (that + norm of the rest's)}.

        A share near 0 is a dead term; {} where no block is distilled.
        """
        return {}


def freeze(module: nn.Module) -> None:
    """Turn a module's parameters into buffers of the same names: saved and exported as before, unknown to the optimiser.

    A parameter without a gradient would meet every ZeRO stage and checkpoint; a buffer meets none.
    """
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())


def with_zero_gradient(weight: Tensor) -> Tensor:
    """The same values, whose gradient is zero and not missing: Adam counts its steps alike at every ZeRO stage.

    For a layer that is held for a while; its lr_scales entry must be 0 meanwhile, or it decays.
    """
    return weight.detach() + 0 * weight


def all_places(num: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """ids [num, rows * columns] of every patch of a grid, in order: for networks that see whole pictures."""
    return torch.arange(grid[0] * grid[1], device=device).expand(num, -1)
