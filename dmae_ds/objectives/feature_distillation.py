"""DMAE's term by itself: a student's blocks imitate a frozen teacher's blocks (DMAE, Eq. 2), beside whatever else a student learns.

`dmae` adds it to pixels. Beside a contrastive objective (DMAE, Table 9) the paper says no more than that it helps; what is
done here: both look at the same whole pictures, the global crops as they were drawn, colours and all; block 3/4 of the
student imitates block 3/4 of the teacher, CLS and every patch, by Eq. 2 with alpha 1, as in masked autoencoding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmae_ds.config.objectives import FeatureDistillationConfig
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT, initialize_as_mae
from dmae_ds.objectives.align import build_head, distance


class TeacherShape(NamedTuple):
    """All that an objective knows of its teacher. decoder_dim: width of its decoder, patch_size: in px; 0 where nobody asks."""

    depth: int
    embed_dim: int
    decoder_depth: int = 0
    decoder_dim: int = 0
    patch_size: int = 0


def resolve_pairs(
    pairs: list[tuple[int, int]] | None, *, student_depth: int, teacher_depth: int
) -> list[tuple[int, int]]:
    """The aligned (student block, teacher block), counted from 1; None: three quarters of both depths (DMAE, Sec. 4.1).

    Raises UserError for a block that doesn't exist and for a pair given twice.
    """
    if pairs is None:
        return [(max(1, student_depth * 3 // 4), max(1, teacher_depth * 3 // 4))]
    for side, depth, blocks in (
        ("student", student_depth, [s for s, _ in pairs]),
        ("teacher", teacher_depth, [t for _, t in pairs]),
    ):
        if max(blocks) > depth:
            raise UserError(
                f"objective.pairs names {side} block {max(blocks)}, but the {side} has {depth}; blocks count from 1"
            )
    if len(set(pairs)) < len(pairs):
        raise UserError(f"objective.pairs {[list(pair) for pair in pairs]} names a pair twice")
    return list(pairs)


class FeatureDistillation(nn.ModuleList):
    """One projection head for each aligned pair of blocks, student width to teacher width.

    taps: what to ask of the frozen teacher; blocks: what to tap of the student, counted from 1; alpha: the term's weight
    Raises UserError as `resolve_pairs` does.
    """

    def __init__(
        self,
        config: FeatureDistillationConfig,
        *,
        student: MaskedViT,
        teacher: TeacherShape,
        generator: torch.Generator,
    ):
        pairs = resolve_pairs(config.pairs, student_depth=student.depth, teacher_depth=teacher.depth)
        super().__init__(build_head(config.head, student.embed_dim, teacher.embed_dim) for _ in pairs)
        initialize_as_mae(self, generator)
        self.pairs, self.blocks = pairs, [block for block, _ in pairs]
        self.taps = tuple(f"block/{block}" for block in sorted({block for _, block in pairs}))
        self.head, self.alpha, self.distance, self.normalize = (
            config.head,
            config.alpha,
            config.distance,
            config.normalize,
        )

    def forward(self, tapped: dict[int, Tensor], features: dict[str, Tensor]) -> dict[str, Tensor]:
        """How far each pair is apart: {"align/9-18": scalar, ...}, with gradients, not yet times alpha.

        tapped {student block: [N, 1 + K, D]}; features {"block/18": [N, 1 + K, D_t], ...}, or [N, K, D_t] of a teacher
        without CLS, which has no target for the student's.
        """
        found = {}
        for (student_block, teacher_block), head in zip(self.pairs, self, strict=True):
            target = features[f"block/{teacher_block}"]
            projected = head(tapped[student_block][:, -target.shape[1] :])
            found[f"align/{student_block}-{teacher_block}"] = distance(
                self.distance, projected, target, normalize=self.normalize
            )
        return found

    def describe(self) -> str:
        """Part of the line at the start of a run."""
        pairs = ", ".join(f"{student} <- {teacher}" for student, teacher in self.pairs)
        return f"block {pairs}, {self.head} head, {self.distance} distance, normalize {self.normalize}, alpha {self.alpha:g}"


def gradient_shares(student: MaskedViT) -> dict[str, Tensor]:
    """After backward: {"share/9": norm of distillation's gradient at student block 9 / (that + norm of the rest's)}."""
    norms = student.gradient_norms
    return {
        f"share/{block}": norms[block]["tap"] / (norms[block]["tap"] + norms[block]["trunk"])
        for block in sorted(norms)
    }
