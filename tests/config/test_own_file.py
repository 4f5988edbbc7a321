"""A teacher that was trained here: the numbers that a recipe leaves out come from the file's metadata."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.config.load import load_config
from dmae_ds.output.safetensors_header import read_header

NUMBERS = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 5, "num_heads": 3}
NONE = [f"teacher.{name}=null" for name in NUMBERS]


@pytest.fixture
def run(tmp_path):
    """A run folder with a student; its tensors do not matter here."""
    metadata = {"timm_name": "vit_tiny_patch16_224", "timm_overrides": json.dumps(NUMBERS)}
    save_file({"cls_token": torch.zeros(1, 1, 48)}, tmp_path / "student.safetensors", metadata=metadata)
    return tmp_path


@pytest.mark.parametrize("weights", ["student.safetensors", "."])
def test_numbers_that_the_recipe_leaves_out_come_from_the_file(run, weights):
    config = load_config("digits_dmae", [*NONE, f"teacher.weights={run / weights}"])
    assert config.teacher.overrides() == NUMBERS


@pytest.mark.parametrize(
    "change",
    [["teacher.depth=7"], ["teacher.name=vit_small_patch16_224"], ["teacher.format=timm"]],
    ids=["a number is given", "another network", "a format without these metadata"],
)
def test_a_recipe_that_says_otherwise_is_left_as_it_is(run, change):
    config = load_config("digits_dmae", [*NONE, f"teacher.weights={run}", *change])
    assert config.teacher.overrides() == ({"depth": 7} if "depth" in change[0] else {})


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x02\0\0\0\0\0\0\0{]"])
def test_what_is_no_safetensors_file_has_no_header(tmp_path, content):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    assert read_header(path) is None
    config = load_config("digits_dmae", [*NONE, f"teacher.weights={path}"])
    assert config.teacher.overrides() == {}
