"""Feature distillation, next to any loss: student blocks imitate blocks of a frozen teacher (DMAE, Eq. 2).

`dmae` adds it to pixels. Next to a contrastive objective (DMAE, Table 9) the paper gives no details. What is
done here: student and teacher look at the same whole images, the global crops as they were drawn, with their
colours; block 3/4 of the student imitates block 3/4 of the teacher, CLS and every patch, by Eq. 2 with alpha
1, as in masked autoencoding.
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
    """Everything that an objective knows about its frozen teacher.

    decoder_depth, decoder_dim: blocks and width of its decoder; patch_size: px; num_heads: of a block's
        attention; 0 where no objective reads it
    num_superset: patches that it sees with teacher.sees=superset; 0: it sees others
    weight: factor of its terms in the loss, of one of several teachers
    """

    depth: int
    embed_dim: int
    decoder_depth: int = 0
    decoder_dim: int = 0
    patch_size: int = 0
    has_cls: bool = True
    num_heads: int = 0
    num_superset: int = 0
    weight: float = 1.0


def resolve_pairs(
    pairs: list[tuple[int, int]] | None,
    *,
    student_depth: int,
    teacher_depth: int,
    key: str = "objective.pairs",
) -> list[tuple[int, int]]:
    """Return the distilled (student block, teacher block), counted from 1.

    pairs: the recipe's; None: 3/4 of both depths (DMAE, Sec. 4.1); key: of the recipe, for messages
    Raises UserError for a block that doesn't exist and for a pair given twice.
    """
    if pairs is None:
        return [(max(1, student_depth * 3 // 4), max(1, teacher_depth * 3 // 4))]
    for side, depth, blocks in (
        ("student", student_depth, [student for student, _ in pairs]),
        ("teacher", teacher_depth, [teacher for _, teacher in pairs]),
    ):
        if max(blocks) > depth:
            raise UserError(
                f"{key} names {side} block {max(blocks)}, and the {side} has {depth} blocks; "
                "they count from 1"
            )
    if len(set(pairs)) < len(pairs):
        raise UserError(f"{key} {[list(pair) for pair in pairs]} names a pair twice")
    return list(pairs)


class FeatureDistillation(nn.ModuleList):
    """One projection head for each distilled pair of blocks, student width to teacher width.

    taps: what is asked of the frozen teacher, {"block/18", ...}; blocks: the student's blocks, counted from 1
    Without `config` the term is absent: no pair, no parameter, and `add_to` returns the loss as it is.
    Raises UserError as `resolve_pairs` does.
    """

    def __init__(
        self,
        config: FeatureDistillationConfig | None,
        *,
        student: MaskedViT,
        teacher: TeacherShape | None,
        generator: torch.Generator,
    ):
        super().__init__()
        self.config = config
        self.pairs: list[tuple[int, int]] = []
        if config is not None:
            self.pairs = resolve_pairs(config.pairs, student_depth=student.depth, teacher_depth=teacher.depth)
            self.extend(build_head(config.head, student.embed_dim, teacher.embed_dim) for _ in self.pairs)
            initialize_as_mae(self, generator)
        self.blocks = [block for block, _ in self.pairs]
        self.taps = tuple(f"block/{block}" for block in sorted({block for _, block in self.pairs}))

    def forward(self, tapped: dict[int, Tensor], features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the distance of each pair, {"align/9-18": scalar, ...}, with gradients, before alpha.

        tapped: {student block: [N, 1 + K, D]}, what the student's forward gives for `taps=self.blocks`
        features: {"block/18": [N, 1 + K, D_t], ...}; [N, K, D_t] of a teacher without CLS, where the
            student's CLS has no target
        """
        distances = {}
        for (student_block, teacher_block), head in zip(self.pairs, self, strict=True):
            target = features[f"block/{teacher_block}"]
            # CLS is compared where both have it.
            num_tokens = min(target.shape[1], tapped[student_block].shape[1])
            projected, target = head(tapped[student_block][:, -num_tokens:]), target[:, -num_tokens:]
            distances[f"align/{student_block}-{teacher_block}"] = distance(
                self.config.distance, projected, target, normalize=self.config.normalize
            )
        return distances

    def add_to(
        self, loss: Tensor, tapped: dict[int, Tensor], features: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss with the term added, and the detached parts {"align/9-18": scalar, ...}.

        Eq. 3: L = L_MAE + alpha * L_Dist, with another objective's loss in the place of MAE's where it is
        another's.
        tapped, features: as in `forward`
        """
        parts = {}
        for name, align in self(tapped, features).items():
            loss = loss + self.config.alpha * align
            parts[name] = align.detach()
        return loss, parts

    def describe(self) -> list[str]:
        """Return the term's settings as one text in a list, or an empty list where the term is absent."""
        if self.config is None:
            return []
        pairs = ", ".join(f"{student} <- {teacher}" for student, teacher in self.pairs)
        config = self.config
        return [
            f"block {pairs}, {config.head} head, {config.distance} distance, normalize {config.normalize}, "
            f"alpha {config.alpha:g}"
        ]
