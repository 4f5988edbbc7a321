"""A weights file of another width is refused by its first bytes; the rest is left to the reader."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.config.networks import ModelConfig
from dmae_ds.weights.early import check_file
from dmae_ds.weights.label import TEACHER
from tests.messages import refused

SMALL = ModelConfig(name="vit_small_patch16_224")  # 384 wide
OTHER = ModelConfig(name="own:network")  # of a width that only torch can tell
TOKENS = {name: torch.zeros(1, 1, 768) for name in ("cls_token", "ema.cls_token")}


def written(folder, *names):
    path = folder / "weights.safetensors"
    save_file({name: TOKENS[name] for name in names} | {"norm.weight": torch.zeros(768)}, path)
    return path


def test_a_class_token_of_another_width_is_refused(tmp_path):
    with refused("teacher.weights", "cls_token [1, 1, 768]", "[1, 1, 384]", SMALL.name):
        check_file(written(tmp_path, "cls_token"), SMALL, TEACHER)


@pytest.mark.parametrize(
    ("names", "network"),
    [
        ([], SMALL),  # SigLIP's ViTs have no class token
        (["cls_token", "ema.cls_token"], SMALL),
        (["cls_token"], OTHER),
        (["cls_token"], None),
        (["cls_token"], SMALL.model_copy(update={"embed_dim": 768})),
    ],
)
def test_what_the_first_bytes_do_not_decide_is_accepted(tmp_path, names, network):
    check_file(written(tmp_path, *names), network, TEACHER)
