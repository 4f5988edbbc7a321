"""DMAE: pixels, and features that imitate a frozen teacher's at three quarters of the depth (DMAE, Eq. 1-3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmae_ds.config.objectives import DmaeConfig
from dmae_ds.errors import UserError
from dmae_ds.models.masking import MaskedBatch
from dmae_ds.models.vit import MaskedViT, initialize_as_mae
from dmae_ds.objectives.align import build_head, distance
from dmae_ds.objectives.mae import Mae


class TeacherShape(NamedTuple):
    """All that an objective knows of its teacher."""

    depth: int
    embed_dim: int


def resolve_pairs(pairs: list[tuple[int, int]] | None, *, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """The aligned (student block, teacher block), counted from 1; None: three quarters of both depths (DMAE, Sec. 4.1).

    Raises UserError for a block that doesn't exist and for a pair given twice.
    """
    if pairs is None:
        return [(max(1, student_depth * 3 // 4), max(1, teacher_depth * 3 // 4))]
    for side, depth, blocks in (("student", student_depth, [s for s, _ in pairs]), ("teacher", teacher_depth, [t for _, t in pairs])):
        if max(blocks) > depth:
            raise UserError(f"objective.pairs names {side} block {max(blocks)}, but the {side} has {depth}; blocks count from 1")
    if len(set(pairs)) < len(pairs):
        raise UserError(f"objective.pairs {[list(pair) for pair in pairs]} names a pair twice")
    return list(pairs)


class Dmae(Mae):
    """Mae plus one projection head for each aligned pair of blocks."""

    def __init__(self, config: DmaeConfig, *, student: MaskedViT, teacher: TeacherShape, generator: torch.Generator):
        super().__init__(config, student=student, generator=generator)
        self.pairs = resolve_pairs(config.pairs, student_depth=student.depth, teacher_depth=teacher.depth)
        self.taps = tuple(f"block/{block}" for block in sorted({block for _, block in self.pairs}))
        self.head, self.alpha, self.distance, self.normalize = config.head, config.alpha, config.distance, config.normalize
        self.heads = nn.ModuleList(build_head(config.head, student.embed_dim, teacher.embed_dim) for _ in self.pairs)
        initialize_as_mae(self.heads, generator)

    def describe(self) -> str:
        pairs = ", ".join(f"{student} <- {teacher}" for student, teacher in self.pairs)
        return f"{super().describe()}; block {pairs}, {self.head} head, {self.distance} distance, normalize {self.normalize}, alpha {self.alpha:g}"

    def forward(self, batch: MaskedBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """features {"block/18": [N, 1 + K, D_t], ...}, or [N, K, D_t] of a teacher without CLS, which has no target for the student's.

        Returns {"loss", "pixel", "align/9-18", ...}, scalars.
        """
        latent, tapped = self.student(batch.visible, batch.ids_keep, taps=[block for block, _ in self.pairs])
        pixel = self.pixel_loss(latent, batch)
        parts = {"pixel": pixel.detach()}
        loss = pixel
        for (student_block, teacher_block), head in zip(self.pairs, self.heads, strict=True):
            name = f"align/{student_block}-{teacher_block}"
            target = features[f"block/{teacher_block}"]
            align = distance(self.distance, head(tapped[student_block][:, -target.shape[1] :]), target, normalize=self.normalize)
            loss = loss + self.alpha * align  # Eq. 3: L = L_MAE + alpha * L_Dist
            parts[name] = align.detach()
        return {"loss": loss, **parts}

    def gradient_shares(self) -> dict[str, Tensor]:
        norms = self.student.gradient_norms
        return {f"share/{block}": norms[block]["tap"] / (norms[block]["tap"] + norms[block]["trunk"]) for block in sorted(norms)}
