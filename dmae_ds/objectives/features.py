"""Features of a frozen network, imitated on whole or masked images (Proteus, MaskDistill and their kind).

Proteus (ICLR 2025): the tokens of a DINOv2 by three heads, and a second, masked pass of half of the images.
MaskDistill (TMLR 2023): standardised patch features of a CLIP at masked patches. Both are recipes; what they
compare is a list of targets (config/features.py). With `kl` over a queue and over patches it is the
distillation of LightlyTrain, version 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmae_ds.config.features import FeaturesConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.views import View
from dmae_ds.errors import UserError
from dmae_ds.models.masking import PatchBatch, gather_patches
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import WHOLE, Objective, all_places, freeze
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.objectives.feature_mask import MaskToken, draw_mask, num_masked
from dmae_ds.objectives.feature_term import FeatureTerm
from dmae_ds.objectives.masked import random_patches
from dmae_ds.objectives.needs import Progress
from dmae_ds.objectives.teacher_drop import draw_drops, drop_factors

OF_THE_MASKED_PASS = ("masked", "visible")


@dataclass
class FeaturesBatch(PatchBatch):
    """Patches that the teacher sees, the student's copy of them, and the places of its mask.

    visible [N, K, P, P, C]: whole images, unless the mask drops patches
    own: the student's copy of `visible`; the same tensor, unless its colours are changed
    places [M, masked] and rest [M, L - masked]: ids of masked and other patches, of one image in `every`;
        None without mask tokens
    drops [N, teachers]: draws of teacher dropping (teacher_drop.py); None without it
    """

    own: Tensor
    places: Tensor | None = None
    rest: Tensor | None = None
    drops: Tensor | None = None


class Features(Objective):
    """The student, a head for each target, and a mask token where the mask has one."""

    def __init__(
        self,
        config: FeaturesConfig,
        *,
        student: MaskedViT,
        teachers: dict[str, TeacherShape],
        generator: torch.Generator,
    ):
        super().__init__(student)
        self.config, self.mask, self.teachers = config, config.mask, teachers
        self.taps = config.tapped
        self.blocks = _student_blocks(config, student.depth)
        _check_cls(config, student)
        self.pairs = [  # of the one teacher: a pair does not say whose block it means
            (int(target.student[6:]), int(target.tap[6:]))
            for target in config.targets
            if target.student.startswith("block/") and target.tap.startswith("block/")
        ]
        if config.photometric is not None:
            self.views = (View(), View(copy_of=0, photometric=config.photometric))
        self.terms = nn.ModuleList(
            FeatureTerm(
                target,
                student_dim=student.embed_dim,
                teacher_dim=teachers[target.teacher].embed_dim,
                generator=generator,
            )
            for target in config.targets
        )
        self.num_masked, self.mask_token = 0, None
        if self.mask is not None:
            self.num_masked = num_masked(student.num_patches, self.mask.ratio)
            if self.mask.by == "drop":
                self.num_visible = student.num_patches - self.num_masked
            else:
                self.mask_token = MaskToken(student.embed_dim, generator)
        if all(target.student.startswith("block/") for target in config.targets):
            freeze(student.norm)  # no target reads what it gives
        self.drop_seed = 0
        if config.teacher_drop:
            self.drop_seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
            weights = torch.tensor([shape.weight for shape in teachers.values()])
            self.register_buffer("teacher_weights", weights, persistent=False)

    def describe(self) -> str:
        terms = []
        for target in self.config.targets:
            where = "" if target.where == "all" else f" ({target.where})"
            terms.append(f"{target.student}{where} <- {target.tap}, {target.head}, {target.distance}")
        if self.config.teacher_drop:
            terms.append(f"a teacher is dropped with probability {self.config.teacher_drop:g}")
        if self.mask is None:
            return "; ".join([*terms, "whole images"])
        mask = f"{self.num_masked} of {self.student.num_patches} patches masked ({self.mask.shape}), "
        mask += {"tokens": "mask tokens", "drop": "dropped"}[self.mask.by]
        if self.mask.whole_pass:
            mask += f", in a pass of its own of one image in {self.mask.every}"
        return "; ".join([*terms, mask])

    def start_step(self, progress: Progress) -> None:
        for term in self.terms:
            if term.queue is not None:
                term.queue.start_step(progress)

    def memory(self) -> dict[str, Tensor]:
        return {
            f"queue/{term.target.label}": term.queue.rows for term in self.terms if term.queue is not None
        }

    @property
    def shown(self) -> tuple[object, ...] | None:
        """Whole images, or what the mask leaves of them."""
        if type(self).prepare is not Features.prepare:
            return None
        if self.mask is None or self.mask.by != "drop":
            return WHOLE
        is_random = self.mask.shape == "random"
        return random_patches(self.num_visible) if is_random else (self.mask.shape, self.num_visible)

    def prepare(self, batch: Batch, normalize: nn.Module) -> FeaturesBatch:
        """Return the batch with its mask, drawn from the batch's noise."""
        patches = [patchify(view, self.student.patch_size) for view in batch.views]
        ids = all_places(len(batch.noise), self.student.grid, batch.noise.device)
        ids_masked, places, rest = ids[:, :0], None, None
        if self.mask is not None:
            drawn = {"shape": self.mask.shape, "grid": self.student.grid}
            if self.mask.by == "drop":
                ids, ids_masked = draw_mask(batch.noise, self.num_masked, **drawn)
            else:
                rest, places = draw_mask(batch.noise[:: self.mask.every], self.num_masked, **drawn)
        drops = None
        if self.config.teacher_drop:
            drops = draw_drops(batch, len(self.teachers), seed=self.drop_seed)
        visible = normalize(gather_patches(patches[0], ids))
        return FeaturesBatch(
            visible=visible,
            masked=normalize(gather_patches(patches[0], ids_masked)),
            ids_keep=ids,
            ids_masked=ids_masked,
            own=visible if len(patches) == 1 else normalize(gather_patches(patches[1], ids)),
            places=places,
            rest=rest,
            drops=drops,
        )

    def forward(self, batch: FeaturesBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", and each target's distance by its name, before its weight}, scalars.

        features: {"tokens": [N, 1 + K, D_t], "cls": [N, D_t], ...}
        """
        whole = masked = None
        if self.mask_token is None or self.mask.whole_pass:
            whole = self.student(batch.own, batch.ids_keep, taps=self.blocks)
        if self.mask_token is not None:
            masked = self._masked_pass(batch)
        parts, losses, projected = {}, [], {}
        # Vectors first: others may take CLS through their heads.
        for term in sorted(self.terms, key=lambda term: not term.target.is_vector):
            target = term.target
            of_masked = masked is not None and (whole is None or target.where in OF_THE_MASKED_PASS)
            latent, tapped = masked if of_masked else whole
            is_block = target.student.startswith("block/")
            tokens = tapped[int(target.student[6:])] if is_block else latent
            wanted = features[target.tap]
            if of_masked and self.mask.every > 1:
                wanted = wanted[:: self.mask.every]
            if target.is_vector:
                predicted = term(self._vector(tokens, target.student))
                projected[target.label] = predicted
            else:
                predicted, wanted = self._compared(term, tokens, wanted, batch, projected)
            distance = term.loss(predicted, wanted, per_image=batch.drops is not None)
            losses.append((target.teacher, self.teachers[target.teacher].weight * target.weight * distance))
            parts[target.label] = distance.detach().mean()
        if batch.drops is None:
            loss = sum(distance for _, distance in losses)
        else:
            loss, kept = self._with_drops(losses, batch.drops)
            parts |= kept
        for name, (weight, distance) in self.more_terms(
            None if whole is None else whole[0], features
        ).items():
            loss = loss + weight * distance
            parts[name] = distance.detach()
        return {"loss": loss, **parts}

    def _with_drops(
        self, losses: list[tuple[str, Tensor]], drops: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss after dropping, a scalar, and the share of images that keep each teacher.

        losses: (teacher, [N]) of each term, weighted
        """
        by_teacher = torch.stack(
            [sum(loss for owner, loss in losses if owner == name) for name in self.teachers], dim=1
        )  # [N, teachers]
        factors = drop_factors(by_teacher.detach(), self.teacher_weights, drops, self.config.teacher_drop)
        shares = (factors > 0).float().mean(dim=0)
        kept = {f"kept/{name}": share for name, share in zip(self.teachers, shares, strict=True)}
        return (factors * by_teacher).sum(dim=1).mean(), kept

    def more_terms(
        self, latent: Tensor | None, features: dict[str, Tensor]
    ) -> dict[str, tuple[float, Tensor]]:
        """Return further terms by name, each with its weight; a subclass adds them.

        latent: the student's tokens [N, 1 + K, D] without mask tokens; None where it has no such pass
        """
        return {}

    def _masked_pass(self, batch: FeaturesBatch) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the student on images in which mask tokens stand for the masked patches."""
        patches, ids = batch.own[:: self.mask.every], batch.ids_keep[:: self.mask.every]
        is_masked = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        is_masked = is_masked.scatter(1, batch.places, True)
        return self.student(
            patches, ids, taps=self.blocks, replace=lambda tokens: self.mask_token(tokens, is_masked)
        )

    def _vector(self, tokens: Tensor, place: str) -> Tensor:
        return tokens[:, 0] if place == "cls" else tokens[:, self.student.num_cls :].mean(dim=1)

    def _compared(
        self,
        term: FeatureTerm,
        tokens: Tensor,
        wanted: Tensor,
        batch: FeaturesBatch,
        projected: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Project the student's tokens [N, 1 + K, D] where they are compared with the teacher's."""
        target = term.target
        has_cls = self.teachers[target.teacher].has_cls
        patches, wanted_patches = tokens[:, self.student.num_cls :], wanted[:, has_cls:]
        if target.where in OF_THE_MASKED_PASS and self.mask_token is not None:
            ids = batch.places if target.where == "masked" else batch.rest
            return term(gather_patches(patches, ids)), gather_patches(wanted_patches, ids)
        if target.where != "all" or not has_cls or not self.student.num_cls:
            return term(patches), wanted_patches
        if target.cls_head is None:
            return term(torch.cat([tokens[:, :1], patches], dim=1)), wanted
        cls = projected[target.cls_head]
        return torch.cat([cls[:, None], term(patches)], dim=1), wanted


def _check_cls(config: FeaturesConfig, student: MaskedViT) -> None:
    """Raise UserError where a target reads the CLS token of a student that has none."""
    targets = [target.label for target in config.targets if target.student == "cls"]
    if targets and not student.num_cls:
        raise UserError(
            f"objective.targets '{targets[0]}' compares student=cls, and the student has no CLS token; set "
            "student=mean"
        )


def _student_blocks(config: FeaturesConfig, depth: int) -> list[int]:
    """Return the student's tapped blocks. Raises UserError where one does not exist, or the last is idle."""
    blocks = sorted(
        {int(target.student[6:]) for target in config.targets if target.student.startswith("block/")}
    )
    if blocks and blocks[-1] > depth:
        raise UserError(
            f"objective.targets names student block/{blocks[-1]}, and the student has {depth} blocks; they "
            "count from 1"
        )
    if len(blocks) and blocks[-1] < depth and all(t.student.startswith("block/") for t in config.targets):
        raise UserError(
            f"objective.targets compares no output of the student above block/{blocks[-1]}, so blocks up to "
            f"{depth} would learn nothing; add a target with student=tokens or block/{depth}"
        )
    return blocks
