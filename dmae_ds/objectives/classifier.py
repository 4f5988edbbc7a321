"""A student with a distillation token as timm names it, so that timm alone loads and runs what was trained.

timm's DeiT puts the token right after CLS and adds a positional embedding to it; attention does not depend on
the order of tokens, and the embedding is zero: the same network. In evaluation mode it returns the mean of
the two heads' logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import timm
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from dmae_ds.errors import UserError

# Any of timm's distilled ViTs works: all its numbers are overridden.
NAME = "deit_base_distilled_patch16_224"


@dataclass(frozen=True)
class Classifier:
    """How timm builds what an objective trains.

    `timm.create_model(name, **numbers, **keys)` is the network, `tensors(weights)` its state dict, strictly.
    tensors: turns the objective's state dict {name: tensor} into timm's
    """

    name: str
    numbers: dict
    keys: dict
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    def build(self) -> nn.Module:
        """Return the network with initial weights."""
        return timm.create_model(self.name, **self.numbers, **self.keys)


def distilled_classifier(objective: nn.Module) -> Classifier:
    """Return the classifier of an objective with `student`, `dist_token`, `head` and `head_dist`.

    Raises UserError where the student is no plain ViT.
    """
    student = objective.student
    block = student.blocks[0]
    numbers = {
        "img_size": student.grid[0] * student.patch_size,
        "patch_size": student.patch_size,
        "embed_dim": student.embed_dim,
        "depth": student.depth,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / student.embed_dim,
    }
    if student.channels != 3:
        numbers["in_chans"] = student.channels
    classifier = Classifier(NAME, numbers, {"num_classes": objective.head.out_features}, timm_names)
    with init_empty_weights():
        known = classifier.build().state_dict()
    trained = timm_names({name: tensor.to("meta") for name, tensor in objective.state_dict().items()})
    different = sorted(
        name
        for name in known.keys() | trained.keys()
        if name not in known or name not in trained or known[name].shape != trained[name].shape
    )
    if different:
        raise UserError(
            f"a distillation token requires a plain ViT, and this student's {', '.join(different[:3])} "
            "are not of one; choose for example student.name=vit_base_patch16_224"
        )
    return classifier


def timm_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an objective {its name: tensor} under timm's names."""
    named = {name.removeprefix("student."): tensor for name, tensor in weights.items()}
    positions = named["pos_embed"]
    # [1, 1 + L, D] -> [1, 2 + L, D]: CLS, the distillation token, patches
    named["pos_embed"] = torch.cat(
        [positions[:, :1], torch.zeros_like(positions[:, :1]), positions[:, 1:]], dim=1
    )
    return named
