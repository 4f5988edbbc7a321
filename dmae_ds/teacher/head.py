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

    pool mean with `fc_norm`: patch tokens -> mean -> norm (MAE's fine-tuning). Otherwise each token is
    normed, and then pooled by `mean` over patches or by `cls`.
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
        self.pool = pool
        self.norm_name = NORMS[norm_after_pool]
        self.num_prefix = int(has_cls)
        setattr(self, self.norm_name, norm)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, encoded: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> dict[str, Tensor]:
        """Classify whole images.

        encoded: [N, 1 + L, D_t], or [N, L, D_t] without CLS, right after the encoder's last block
        Returns {"logits": [N, C]}.
        """
        norm = getattr(self, self.norm_name)
        norm_last = self.norm_name == "fc_norm"
        tokens = encoded if norm_last else norm(encoded)
        pooled = tokens[:, 0] if self.pool == "cls" else tokens[:, self.num_prefix :].mean(dim=1)
        return {"logits": self.head(norm(pooled) if norm_last else pooled)}


def meta_head(
    weights: Weights | None, vit: MaskedViT, norm: nn.Module, *, pool: str, num_classes: int | None
) -> TeacherHead:
    """Build a classifier on the meta device.

    norm: the encoder's own final norm; weights: the file that it is checked against, if any
    pool: the recipe's; num_classes: of the data, None: whatever the file has
    Raises UserError where the file has no head, one for other classes, or a norm that doesn't go with the
    pooling.
    """
    if pool == "cls" and vit.cls_token is None:
        raise UserError("teacher.pool is cls, but the teacher has no CLS token; set teacher.pool=mean")
    norm_after_pool = pool == "mean"
    if weights is not None:
        _check(weights, pool=pool, num_classes=num_classes)
        num_classes = weights.like("head.weight").shape[0]
        norm_after_pool = "fc_norm.weight" in weights
    with init_empty_weights():
        if isinstance(norm, nn.Identity):
            # timm built no final norm; it is of the same kind, width and epsilon as those of the blocks.
            block_norm = vit.blocks[0].norm1
            norm = type(block_norm)(vit.embed_dim, eps=block_norm.eps)
        return TeacherHead(
            norm,
            embed_dim=vit.embed_dim,
            num_classes=num_classes,
            pool=pool,
            norm_after_pool=norm_after_pool,
            has_cls=vit.cls_token is not None,
        )


def _check(weights: Weights, *, pool: str, num_classes: int | None) -> None:
    path = weights.path
    if "head.weight" not in weights:
        raise UserError(
            f"teacher.weights '{path}' is {describe_kind(weights.container) or 'not a classifier'}, but the "
            "objective taps logits; give a fine-tuned classifier, such as mae_finetuned_vit_large.pth or "
            "best.safetensors of `dmae-ds eval finetune`"
        )
    file_classes = weights.like("head.weight").shape[0]
    if num_classes is not None and file_classes != num_classes:
        raise UserError(
            f"teacher.weights '{path}' has {file_classes} classes, data.train has {num_classes}; give a "
            "teacher that was fine-tuned on the same classes"
        )
    file_pool = read_pool(weights)
    if file_pool is not None and file_pool != pool:
        raise UserError(
            f"teacher.pool is {pool}, but teacher.weights '{path}' was trained with {file_pool}; set "
            f"teacher.pool={file_pool}"
        )
    if pool == "cls" and "fc_norm.weight" in weights:
        raise UserError(
            f"teacher.pool is cls, but teacher.weights '{path}' has a norm after the pooling (fc_norm), as "
            "classifiers of the mean have; set teacher.pool=mean"
        )


def read_pool(weights: Weights) -> str | None:
    """The pooling that a file of `dmae-ds eval finetune` names in its metadata; None for other files."""
    about = weights.container.metadata.get("classifier")
    pools = {"avg": "mean", "token": "cls"}
    return None if about is None else pools.get(json.loads(about)["keys"].get("global_pool"))
