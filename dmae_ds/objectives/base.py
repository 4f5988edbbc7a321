"""What every objective is: one module that owns everything the optimiser trains, and declares what it needs.

To add an objective, subclass `Objective`, set the declarations that differ from the defaults, and write
`prepare` and `forward` (and `ema_features` where `ema` is set); `dmae_ds/objectives/README.md` lists the few
other places. The order of calls in every optimiser step: `start_step`, then for each micro-batch
`ema_features` (no gradients) and `forward`, then backward and `gradient_shares`. `prepare` runs ahead of them
by the depth of the teacher's pipeline.

Shapes: N images, L patches, K visible patches, D width of the student, D_t of the teacher, C pixel channels.
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from dmae_ds.data.batch import Batch
from dmae_ds.errors import UserError
from dmae_ds.models.initial import freeze as freeze  # for objectives outside the project
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.classifier import Classifier
from dmae_ds.objectives.needs import EmaSpec, Progress, View

# `Objective.shown` of whole images, their patches row by row.
WHOLE = ("all",)


class Objective(nn.Module):
    """Base class: the declarations with their defaults.

    A subclass sets its own declarations, on the class or in its constructor.
    The constructor is called as `Cls(config, student=, generator=)`, with `teacher=` (a `TeacherShape`) where
    the recipe has a teacher, or `teachers=` ({name: TeacherShape}) where the schema says
    `takes_several_teachers`, and `num_classes=` where it says `needs_labels`. `generator` draws every
    initial weight.

    What it needs
        taps: features of the frozen teacher, "block/18", "relation/18", "tokens", "cls", "pooled",
            "decoder/4", "prediction", "logits"; `FrozenTeacher.features` has their shapes. Of several
            teachers "dino:block/18", ...
        compares_superset: whether it compares patches that only the teacher sees (teacher.sees=superset): the
            first of `ids_masked`, whose features follow those of the student's patches
        shown: which patches `prepare` shows a frozen teacher, as plain values: those of two objectives whose
            values are equal are equal, in equal order. None: not declared. Students of a family whose values
            are equal share a pass of the teacher (family.py)
        views: crops of each image; the first one is `Batch.images`, all of them are `Batch.views`
        rand_augment: timm's RandAugment on every view, in timm's notation; None: not used
        labels: whether `Batch.labels` is read, the same as the schema's `needs_labels`
        num_classes: number of classes of the labels
        ema: which submodules have an EMA copy, and how fast it follows
    What the optimiser is told
        lr_scales: {prefix of parameter names: factor of the coming step's learning rate}; such parameters
            have groups of their own. The prefixes are fixed by the constructor, `start_step` may set factors
        no_weight_decay: names of parameters without weight decay, besides all one-dimensional ones
        positions: the student's positional embedding is a buffer, fixed sin-cos, as in the published code of
            MAE (so of DMAE, G2SD's generic stage and SdAE) and of MoCo-v3. DINO's is learned in its published
            code; here it is fixed, so that methods start alike and the grids of small crops are exact.
            `g2sd_specific` alone trains it (`train_positions`): it fine-tunes on labels, and the published
            code trains it there. A schema tells by `trains_positions`, so that no older checkpoint, which has
            no optimizer state for it, is continued. Students that are no plain ViT (DINOv2 with registers,
            SigLIP, EVA-02) learn theirs under every objective
    What cards, reports and plans show
        num_visible: patches of an image that the student's encoder sees
        pairs: distilled (student block, teacher block), counted from 1
        reconstructs_pixels: whether `decoder` predicts the pixels of masked patches. Such an objective also
            has `mask_ratio`, `pixel_loss`, `visible_at` and `reconstruct`, as `Mae` does
        norm_pix: whether the part "pixel" of the loss compares normalised patches
        pass_of: {name of a student: the pass of the teacher that it reads, from 0}; of a family (family.py)
        initial_notes: what was changed or not read of the file of `student.weights`, set after building
    """

    taps: tuple[str, ...] = ()
    compares_superset: bool = False
    shown: tuple[object, ...] | None = None
    views: tuple[View, ...] = (View(),)
    rand_augment: str | None = None
    labels: bool = False
    num_classes: int | None = None
    ema: EmaSpec | None = None
    no_weight_decay: tuple[str, ...] = ()
    pairs: Sequence[tuple[int, int]] = ()
    reconstructs_pixels: bool = False
    norm_pix: bool = False
    initial_notes: str = ""

    def __init__(self, student: MaskedViT):
        super().__init__()
        self.student = student
        self.num_visible = student.num_patches
        self.lr_scales: dict[str, float] = {}
        self.pass_of: dict[str, int] = {"": 0}

    def prepare(self, batch: Batch, normalize: nn.Module) -> PatchBatch:
        """Return what teacher, EMA teacher and `forward` share of a micro-batch; required.

        batch: on the device; images uint8 [N, 3, H, W], noise float32 [N, L], labels int64 [N], more views
        normalize: uint8 pixels with the channels last, [..., C], to float32 of the recipe's mean and std
        Returns `visible` [N, K, P, P, C] float32, `ids_keep` [N, K] int64, `masked` and `ids_masked` alike; a
        subclass of `PatchBatch` where more is needed. A frozen teacher sees `visible` (and `masked`).
        It is called some steps early where the teacher is pipelined: it must not depend on `start_step` or on
        weights.
        """
        raise NotImplementedError

    def members(self) -> dict[str, Objective]:
        """Return the objectives of all students by name; {"": this one} of one student."""
        return {"": self}

    def inputs_of(
        self, batch: PatchBatch, features: dict[str, Tensor]
    ) -> dict[str, tuple[PatchBatch, dict[str, Tensor]]]:
        """Return what each student's `forward` takes, by name, of what `prepare` and the teacher gave."""
        return {"": (batch, features)}

    def in_passes(self, teacher):
        """Return the frozen teacher as this objective runs it: once a micro-batch."""
        return teacher

    def start_step(self, progress: Progress) -> None:
        """Set temperatures, held layers and other schedules.

        Called before every optimiser step, also before the first one after a resume.
        """

    def ema_features(self, ema: nn.Module, masked: PatchBatch) -> dict[str, Tensor]:
        """Return what the EMA teacher makes of a micro-batch, {"ema/NAME": tensor}.

        Required where `ema` is set. Called without gradients, once a micro-batch before `forward`, whose
        `features` hold what it returns.
        ema: has the submodules named in `EmaSpec.parts` as attributes, and `state`: the tensors of
            `ema_state`, which may be updated in place
        """
        raise NotImplementedError

    def ema_state(self) -> dict[str, Tensor]:
        """Return the initial tensors that the EMA teacher keeps besides its weights (DINO's centre).

        They are checkpointed with it.
        """
        return {}

    def memory(self) -> dict[str, Tensor]:
        """Return what `forward` changes besides gradients, such as a queue of past features, {name: tensor}.

        These are buffers that are not persistent, the same on every rank; a checkpoint keeps them.
        """
        return {}

    def classifier(self) -> Classifier | None:
        """Return how timm builds the classifier that is trained; None where none is.

        Its accuracy is measured at the end of a run.
        """
        return None

    def layer_of(self, name: str) -> int | None:
        """Return a parameter's layer for optim.layer_decay, from 0 (embedding) upwards; None: the top group.

        Where it is None for every parameter, optim.layer_decay is refused.
        """
        return None

    def forward(self, masked: PatchBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss": scalar with gradient, and every named part: scalar without}; required.

        The names are the same in every step; each becomes a column of metrics.jsonl.
        features: {tap: tensor}, [N, 1 + K, D_t] of "block/18", [N, classes] of "logits"; and the tensors of
            `ema_features`
        Call submodules instead of reading their weights: ZeRO-3 gathers a parameter only for the forward of
        the module that owns it.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Return the settings that matter, as one line for the start of a run and for reports."""
        return ""

    def visible_at(self, mask_ratio: float) -> int:
        """Return how many patches stay visible at another mask ratio; only with `reconstructs_pixels`."""
        raise NotImplementedError

    def reconstruct(self, latent: Tensor, batch: PatchBatch) -> Tensor:
        """Return the predicted pixels of masked patches; only with `reconstructs_pixels`.

        latent [N, 1 + K, D]: what the student's encoder gives for the batch
        Returns [N, L - K, P, P, C] float32, in the units of `batch.masked`, also with norm_pix.
        """
        raise NotImplementedError

    def gradient_shares(self) -> dict[str, Tensor]:
        """Return distillation's share of the gradient at each tapped student block, {"share/9": scalar}.

        The share is the norm of distillation's gradient there / (that + norm of the gradient of the rest).
        Called after backward; {} where no block of the student is tapped. A share near 0 is a dead term. A
        block above which no term reads anything has none.
        """
        norms = self.student.gradient_norms
        return {
            f"share/{block}": norms[block]["tap"] / (norms[block]["tap"] + norms[block]["trunk"])
            for block in sorted(norms)
            if len(norms[block]) == 2
        }


def train_positions(student: MaskedViT) -> None:
    """Turn a student's positional embedding from a buffer into a parameter of the same name."""
    positions = student.pos_embed
    del student.pos_embed
    student.pos_embed = nn.Parameter(positions.detach().clone())


def with_zero_gradient(weight: Tensor) -> Tensor:
    """Return the same values with a gradient of zero instead of none.

    For a layer that is held for a while: Adam counts its steps alike at every ZeRO stage. Its lr_scales entry
    must be 0 meanwhile, or its weights decay.
    """
    return weight.detach() + 0 * weight


def require_cls(student: MaskedViT, objective: str) -> None:
    """Raise UserError for a student without CLS under an objective that learns from it."""
    if not student.num_cls:
        raise UserError(
            f"objective.name {objective} learns from the CLS token, and this student has none; choose a "
            "student.name with CLS, such as vit_base_patch16_224"
        )


def all_places(num: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Return ids [num, rows * columns] int64 of every patch of a grid, for networks on whole images."""
    return torch.arange(grid[0] * grid[1], device=device).expand(num, -1)
