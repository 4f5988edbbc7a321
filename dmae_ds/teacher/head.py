"""A fine-tuned classifier's head on top of its frozen encoder, for objectives that tap `logits`."""

from __future__ import annotations

import json

from accelerate import init_empty_weights
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.weights.kinds import describe_kind
from dmae_ds.weights.named import Weights

NORMS = ("norm", "fc_norm")


class TeacherHead(nn.Module):
    """Norm and pooling in timm's order, then a linear layer, under timm's names.

    mean with `fc_norm`: patch tokens -> mean -> norm (MAE's fine-tuning); else each token is normed, then pooled by `mean`
    over patches or `cls`.
    """

    def __init__(
        self,
        norm: nn.Module,
        *,
        embed_dim: int,
        num_classes: int,
        pool: str,
        norm_after_pool: bool,
        has_cls: bool,
    ):
        super().__init__()
        self.pool, self.norm_name, self.num_prefix = pool, NORMS[norm_after_pool], int(has_cls)
        setattr(self, self.norm_name, norm)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, encoded: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> dict[str, Tensor]:
        """encoded [N, 1 + L, D_t], or [N, L, D_t] without CLS, right after the last block, of whole pictures -> {"logits": [N, C]}."""
        norm = getattr(self, self.norm_name)
        tokens = encoded if self.norm_name == "fc_norm" else norm(encoded)
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, self.num_prefix :].mean(dim=1)
        return {"logits": self.head(norm(pooled) if self.norm_name == "fc_norm" else pooled)}


def meta_head(
    weights: Weights | None, vit: MaskedViT, norm: nn.Module, *, pool: str, num_classes: int | None
) -> TeacherHead:
    """A classifier on the meta device. norm: the encoder's own final norm; weights: the file to hold it against, if any.

    pool: of a file that doesn't say; num_classes: of the data, None: whatever the file has
    Raises UserError where the file has no head, or one for other classes, or no norm that goes with the pooling.
    """
    if pool == "cls" and vit.cls_token is None:
        raise UserError("teacher.pool is cls, and the teacher has no CLS token; set teacher.pool=mean")
    after = pool == "mean"
    if weights is not None:
        _check(weights, pool=pool, num_classes=num_classes)
        num_classes, after = weights.like("head.weight").shape[0], "fc_norm.weight" in weights
    with init_empty_weights():
        # A network that timm builds without a final norm has that of its blocks: the same kind, width and epsilon.
        norm = (
            type(vit.blocks[0].norm1)(vit.embed_dim, eps=vit.blocks[0].norm1.eps)
            if isinstance(norm, nn.Identity)
            else norm
        )
        return TeacherHead(
            norm,
            embed_dim=vit.embed_dim,
            num_classes=num_classes,
            pool=pool,
            norm_after_pool=after,
            has_cls=vit.cls_token is not None,
        )


def _check(weights: Weights, *, pool: str, num_classes: int | None) -> None:
    path = weights.path
    if "head.weight" not in weights:
        raise UserError(
            f"teacher.weights '{path}' is {describe_kind(weights.container) or 'no classifier'}; the objective taps logits: give a fine-tuned classifier, "
            "such as mae_finetuned_vit_large.pth or best.safetensors of `dmae-ds eval finetune`"
        )
    found = weights.like("head.weight").shape[0]
    if num_classes is not None and found != num_classes:
        raise UserError(
            f"teacher.weights '{path}' tells {found} classes apart, data.train has {num_classes}; give a teacher that was fine-tuned on the same classes"
        )
    said = said_pool(weights)
    if said is not None and said != pool:
        raise UserError(
            f"teacher.pool is {pool}, teacher.weights '{path}' says {said}; set teacher.pool={said}"
        )
    if pool == "cls" and "fc_norm.weight" in weights:
        raise UserError(
            f"teacher.pool is cls, and teacher.weights '{path}' norms what it has pooled (fc_norm), as classifiers of the mean do; set teacher.pool=mean"
        )


def said_pool(weights: Weights) -> str | None:
    """How a file of `dmae-ds eval finetune` says that it pools; None for others."""
    about = weights.container.metadata.get("classifier")
    pools = {"avg": "mean", "token": "cls"}
    return None if about is None else pools.get(json.loads(about)["keys"].get("global_pool"))
