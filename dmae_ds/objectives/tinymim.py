"""TinyMIM: a student's relations imitate a frozen masked autoencoder's (TinyMIM, CVPR 2023, Sec. 3).

Relations are those of one attention layer, for each head: softmax(q k^T / sqrt(d)) and softmax(v v^T /
sqrt(d)), each network with its own d. Whole images, no mask; only the student's copy has changed colours. The
student's layer is its last one, whose queries, keys and values are cut into as many heads as the teacher has:
the same weights, in another cut. What comes after them in that layer, and the final norm, is not trained and
stays as it was drawn; fine-tuning trains the plain network with its own number of heads.

The published loss takes the logarithm of a softmax, which is not finite where a student's probability
underflows. Here log-probabilities are computed directly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional

from dmae_ds.config.objectives import TinyMimConfig
from dmae_ds.data.batch import Batch
from dmae_ds.errors import UserError
from dmae_ds.models.initial import freeze
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import patchify
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.align import at_least_float32
from dmae_ds.objectives.base import WHOLE, Objective, all_places
from dmae_ds.objectives.feature_distillation import TeacherShape
from dmae_ds.objectives.needs import View
from dmae_ds.teacher.relation import split_heads


@dataclass
class CopiedBatch(PatchBatch):
    """A batch of whole images: `visible` is the teacher's, `copy` [N, L, P, P, C] the student's."""

    copy: Tensor


class TinyMim(Objective):
    """Student whose last block gives queries, keys and values, and nothing else."""

    def __init__(
        self, config: TinyMimConfig, *, student: MaskedViT, teacher: TeacherShape, generator: torch.Generator
    ):
        super().__init__(student)
        block = config.teacher_block or max(1, teacher.depth * 3 // 4)
        if block > teacher.depth:
            raise UserError(
                f"objective.teacher_block is {block}, and the teacher has {teacher.depth} blocks; "
                "they count from 1"
            )
        _check_last_block(student, teacher.num_heads)
        self.num_heads = teacher.num_heads
        self.taps, self.pairs = (f"relation/{block}",), ((student.depth, block),)
        if config.photometric:
            self.views = (View(), View(copy_of=0, photometric="jitter"))
        last = student.blocks[-1]
        untrained = [part for name, part in last.named_children() if name not in ("norm1", "attn")]
        untrained += [part for name, part in last.attn.named_children() if name != "qkv"]
        for part in (*untrained, student.norm):
            freeze(part)

    @property
    def shown(self) -> tuple[object, ...] | None:
        return WHOLE if type(self).prepare is TinyMim.prepare else None

    def prepare(self, batch: Batch, normalize: nn.Module) -> CopiedBatch:
        """Return whole images, the teacher's and the student's copy."""
        views = [normalize(patchify(view, self.student.patch_size)) for view in batch.views]
        ids = all_places(len(views[0]), self.student.grid, views[0].device)
        return CopiedBatch(
            visible=views[0], masked=views[0][:, :0], ids_keep=ids, ids_masked=ids[:, :0], copy=views[-1]
        )

    def describe(self) -> str:
        (student_block, teacher_block) = self.pairs[0]
        colours = ", the student's copy in changed colours" if len(self.views) > 1 else ""
        relations = f"relations of block {student_block} <- {teacher_block}, {self.num_heads} heads"
        return f"whole images{colours}; {relations}"

    def forward(self, batch: CopiedBatch, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"loss", "align/qk", "align/vv"}, scalars.

        features: {"relation/18": [N, 3, heads, 1 + L, d]}; L tokens of a teacher without CLS
        """
        tokens, _ = self.student(batch.copy, batch.ids_keep, depth=self.student.depth - 1)
        last = self.student.blocks[-1]
        student = split_heads(last.attn.qkv(last.norm1(tokens)), self.num_heads)
        target = features[self.taps[0]]
        num_tokens = min(student.shape[3], target.shape[3])  # CLS is compared where both have it
        qk, vv = relation_losses(student[:, :, :, -num_tokens:], target[:, :, :, -num_tokens:])
        return {"loss": qk + vv, "align/qk": qk.detach(), "align/vv": vv.detach()}


def relation_losses(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) of query-key and of value-value relations, scalars (Eq. 4 and 5).

    student [N, 3, heads, T, d], teacher [N, 3, heads, T, d_t]: queries, keys and values
    Sum over keys, mean over images, heads and queries.
    """
    with torch.autocast(student.device.type, enabled=False):
        losses = []
        for one, other in ((0, 1), (2, 2)):
            mine, theirs = (log_relation(each[:, one], each[:, other]) for each in (student, teacher))
            divergence = functional.kl_div(mine, theirs, reduction="none", log_target=True)
            losses.append(divergence.sum(-1).mean())
    return losses[0], losses[1]


def log_relation(queries: Tensor, keys: Tensor) -> Tensor:
    """Return log softmax(q k^T / sqrt(d)) over the keys, [..., T, T], in at least float32.

    queries, keys: [..., T, d]
    """
    queries, keys = at_least_float32(queries), at_least_float32(keys)
    return (queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])).log_softmax(-1)


def _check_last_block(student: MaskedViT, num_heads: int) -> None:
    """Raise UserError for a student whose last block can't be cut into the teacher's heads."""
    if student.embed_dim % num_heads:
        raise UserError(
            f"objective tinymim reads the student's last block with the teacher's {num_heads} heads, and "
            f"student.embed_dim {student.embed_dim} is not a multiple of {num_heads}; choose another "
            "teacher.name or student.embed_dim"
        )
    attention = student.blocks[-1].attn
    is_plain = type(attention) is Attention and isinstance(attention.q_norm, nn.Identity)
    if not is_plain or student.rope is not None:
        raise UserError(
            "objective tinymim reads the student's last block in another number of heads, which its norms of "
            "queries or its rotary positions don't allow; choose a student.name such as vit_base_patch16_224"
        )
