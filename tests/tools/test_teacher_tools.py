"""`dmae-ds teacher inspect | slice`, as a user calls them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dmae_ds.cli.main import main
from dmae_ds.config.networks import TeacherConfig
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.vit import build_student
from dmae_ds.teacher.build import build_frozen_teacher
from dmae_ds.teacher.fill import fill
from dmae_ds.teacher.frozen import meta_teacher
from dmae_ds.teacher.stages import held_blocks
from dmae_ds.tools.teacher_inspect import inspect
from dmae_ds.tools.teacher_slice import slice_teacher
from dmae_ds.weights.named import open_weights
from tests.messages import refused
from tests.train.conftest import environment

NAME = "vit_tiny_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 8, "num_heads": 2}
NUMBERS = [f"{key}={value}" for key, value in TINY.items()]
CPU = torch.device("cpu")


def noisy(state):
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A whole published MAE file of a tiny network: {"model": encoder and decoder}."""
    torch.manual_seed(0)
    state = noisy(timm.create_model(NAME, num_classes=0, **TINY).state_dict())
    state["mask_token"] = torch.zeros(1, 1, 16)
    state["decoder_embed.weight"] = torch.randn(16, 32)
    state["decoder_blocks.0.norm1.bias"] = torch.zeros(16)
    path = tmp_path_factory.mktemp("mae") / "mae_pretrain_full.pth"
    torch.save({"model": state}, path)
    return path


def batch():
    generator = torch.Generator().manual_seed(1)
    visible = torch.randn(2, 3, 8, 8, 3, generator=generator)
    ids_keep = torch.tensor([[3, 0, 9], [15, 2, 4]])
    return PatchBatch(visible=visible, masked=None, ids_keep=ids_keep, ids_masked=None)


def features(weights, *, format, taps=("block/6",), **numbers):
    """The features of a batch at the first tap, of a teacher that is built from a file."""
    config = TeacherConfig(name=NAME, weights=str(weights), format=format, **{**TINY, **numbers})
    half = (0.5, 0.5, 0.5)
    teacher = build_frozen_teacher(config, taps=taps, whole_blocks=8, mean=half, std=half, device=CPU)
    return teacher.features(batch())[taps[0]]


def rows_of(text):
    return {line[:12].strip(): line[12:] for line in text.splitlines()}


def test_inspect_says_which_network_of_a_training_checkpoint_it_describes(tmp_path):
    state = noisy(timm.create_model(NAME, num_classes=0, **TINY).state_dict())
    wrapped = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
    averaged = {f"backbone.{name}": tensor for name, tensor in state.items()}
    torch.save({"student": wrapped, "teacher": averaged, "epoch": 3}, tmp_path / "checkpoint0100.pth")
    content = rows_of(inspect(tmp_path / "checkpoint0100.pth", name=NAME, overrides=NUMBERS))["content"]
    assert "`teacher.backbone.`" in content and "`student.module.backbone.`" in content


def test_inspect_describes_a_file(file):
    rows = rows_of(inspect(file, name=NAME, overrides=NUMBERS))
    assert rows["format"].startswith("mae")
    assert "decoder" in rows["kind"]
    for words in ("width 32", "8 blocks", "4x4 patches of 8 px", "CLS"):
        assert words in rows["network"]
    assert "decoder 5" in rows["parts"] and "blocks 0.1 M" in rows["parts"]
    assert rows["needed"].startswith("6 blocks")
    taps = rows["taps"].split(", ")
    assert (
        taps[:2] == ["block/1 to block/8", "relation/1 to relation/8"] and "tokens" in taps and "cls" in taps
    )
    assert "prediction" in taps and not {"pooled", "logits"} & set(taps)
    assert not list(file.parent.glob("*.json"))  # nothing was written


def test_inspect_names_a_published_network(tmp_path):
    """The real size of ViT-S, under its name in timm."""
    with torch.device("meta"):
        meta = timm.create_model("vit_small_patch16_224", num_classes=0)
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in meta.state_dict().items()}
    save_file(noisy(zeros), tmp_path / "s.safetensors")
    rows = rows_of(inspect(tmp_path / "s.safetensors"))
    assert rows["network"].startswith("vit_small_patch16_224: width 384, 12 blocks, 14x14 patches of 16 px")
    assert rows["recipes"].startswith("none")


def test_inspect_lists_the_recipes_whose_teacher_a_file_is(tmp_path):
    numbers = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 8, "num_heads": 4}
    student = build_student(NAME, numbers, generator=torch.Generator().manual_seed(0))
    metadata = {"timm_name": NAME, "timm_overrides": json.dumps(numbers)}
    save_file(student.state_dict(), tmp_path / "student.safetensors", metadata=metadata)
    rows = rows_of(inspect(tmp_path / "student.safetensors"))
    note = re.compile(r" \(teachers?(\.\w+)?\.format=dmae_ds\)$")
    recipes = {note.sub("", line) for line in rows["recipes"].split(", ")}
    assert recipes >= {"digits_dino_dmae", "digits_dmae", "digits_features", "digits_mocov3_dmae"}
    # The file has no decoder and no classifier, which these require; other networks are not this one.
    assert not {name for name in recipes if "g2sd" in name or "vit_" in name or "(" in name}
    assert "UNTRAINED" in rows["features"]


def error_line(capsys, *arguments):
    assert main(["teacher", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_an_unknown_network_is_described(file, capsys):
    line = error_line(capsys, "inspect", file)
    for words in ("format mae", "width 32", "8 blocks", "patches of 8 px", "--name"):
        assert words in line


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_slices_give_the_features_of_the_whole_file_bit_for_bit(file, tmp_path, num_stages):
    slice_teacher(file, tmp_path / "cut", num_stages=num_stages, name=NAME, overrides=NUMBERS)
    assert len(list((tmp_path / "cut").glob("stage-*.safetensors"))) == num_stages
    for taps in (("block/6",), ("block/2",)):
        sliced = features(tmp_path / "cut", format="dmae_ds", taps=taps)
        assert torch.equal(sliced, features(file, format="mae", taps=taps))


@pytest.mark.parametrize("num_stages", [3, 4])  # four stages of six blocks share some
def test_the_file_of_a_stage_is_all_that_its_rank_needs(file, tmp_path, num_stages):
    slice_teacher(file, tmp_path / "cut", num_stages=num_stages, name=NAME, overrides=NUMBERS)
    load = {"whole_blocks": 8, "may_resize": True, "dtype": torch.float32, "device": CPU}
    whole = meta_teacher(NAME, TINY, 6)
    fill(whole, open_weights(file, "mae"), **load)
    for number, stage in enumerate(held_blocks(6, num_stages), start=1):
        folder = tmp_path / f"rank{number}"
        folder.mkdir()
        own_file = f"stage-{number}-of-{num_stages}.safetensors"
        for name in ("model.safetensors.index.json", "teacher.json", own_file):
            (folder / name).write_bytes((tmp_path / "cut" / name).read_bytes())
        weights = open_weights(folder, "dmae_ds")
        vit = meta_teacher(NAME, TINY, 6)
        fill(vit, weights, blocks=stage, **load)
        for block in range(6):
            expected = whole.blocks[block].state_dict()
            for name, tensor in vit.blocks[block].state_dict().items():
                assert tensor.is_meta == (block not in stage)
                assert tensor.is_meta or torch.equal(tensor, expected[name])
        assert torch.equal(vit.pos_embed, whole.pos_embed)
        with refused(f"{num_stages - 1} ", "stage-"):
            fill(meta_teacher(NAME, TINY, 6), weights, **load)


def test_a_stage_holds_only_the_needed_blocks(file, tmp_path):
    slice_teacher(file, tmp_path / "cut", num_stages=2, name=NAME, overrides=NUMBERS, last_block=5)
    names = [set(load_file(tmp_path / "cut" / f"stage-{number}-of-2.safetensors")) for number in (1, 2)]
    blocks = [{name.split(".")[1] for name in stage if name.startswith("blocks")} for stage in names]
    assert blocks == [{"0", "1", "2"}, {"2", "3", "4"}]  # five blocks in two stages share the middle one
    for stage in names:
        assert {name for name in stage if not name.startswith("blocks")} == {
            "cls_token",
            "pos_embed",
            "patch_embed.proj.weight",
            "patch_embed.proj.bias",
        }
    about = json.loads((tmp_path / "cut" / "teacher.json").read_text())
    assert (about["stages"], about["blocks"], about["whole_blocks"]) == ([[1, 3], [3, 5]], 5, 8)


def test_a_slice_carries_a_fingerprint_that_a_run_checks(file, tmp_path):
    slice_teacher(file, tmp_path / "cut", num_stages=2, name=NAME, overrides=NUMBERS, dtype="bf16")
    part = tmp_path / "cut" / "stage-2-of-2.safetensors"
    tensors = load_file(part)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    features(tmp_path / "cut", format="dmae_ds")
    tensors["blocks.4.attn.proj.weight"] = tensors["blocks.4.attn.proj.weight"].T.contiguous()
    save_file(tensors, part, metadata={"timm_name": NAME, "timm_overrides": json.dumps(TINY)})
    with refused("fingerprint"):
        features(tmp_path / "cut", format="dmae_ds")


def test_a_tap_above_the_cut_is_refused(file, tmp_path):
    slice_teacher(file, tmp_path / "cut", num_stages=2, name=NAME, overrides=NUMBERS)
    with refused("missing 12: blocks.6.norm1.weight", "blocks 1-6", "--last-block"):
        features(tmp_path / "cut", format="dmae_ds", taps=("block/7",))
    slice_teacher(file, tmp_path / "all", num_stages=1, last_block=8, name=NAME, overrides=NUMBERS)
    with refused("norm.weight", "blocks 1-8", "whole file"):
        features(tmp_path / "all", format="dmae_ds", taps=("tokens",))


def test_a_slice_of_another_network_is_refused(file, tmp_path):
    slice_teacher(file, tmp_path / "cut", num_stages=1, name=NAME, overrides=NUMBERS)
    with refused(NAME, "'num_heads': 2", "'num_heads': 4"):
        features(tmp_path / "cut", format="dmae_ds", num_heads=4)


def test_a_killed_slice_leaves_nothing_under_its_name(file, tmp_path):
    code = """
import os, signal, sys
from dmae_ds.tools import teacher_slice as slice
slice.probe_by_block = lambda network: os.kill(os.getpid(), signal.SIGKILL)
from dmae_ds.cli.main import main
main(sys.argv[1:])
"""
    arguments = ["teacher", "slice", file, tmp_path / "cut", "--stages", "2", "--name", NAME, *NUMBERS]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=tmp_path, env=environment(), timeout=600
    )
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["cut.tmp"]
    assert main(list(map(str, arguments))) == 0
    assert os.listdir(tmp_path) == ["cut"]
    features(tmp_path / "cut", format="dmae_ds")


@pytest.mark.parametrize(
    "change, words",
    [
        (["--stages", "7"], ["6 blocks", "7 stages"]),
        (["--stages", "0"], ["--stages 0", "1 or more"]),
        (["--last-block", "9"], ["--last-block 9", "8 blocks", "1 to 8"]),
        (["depth=9"], ["missing 12: blocks.8."]),
        (["embed_dims=3"], ["embed_dims"]),
        (["depth=[1"], ["depth=[1"]),
        (["--format", "mea"], ["'mea'"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(file, tmp_path, change, words, capsys):
    line = error_line(capsys, "slice", file, tmp_path / "cut", "--name", NAME, *NUMBERS, *change)
    assert not [word for word in words if word not in line]
    assert os.listdir(tmp_path) == []


def test_a_folder_s_fingerprint_is_written_again_and_a_slice_s_is_not(file, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    tensors = torch.load(file, weights_only=True)["model"]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, own / "model.safetensors")
    arguments = ["teacher", "inspect", str(own), "--write", "--name", NAME, *NUMBERS]
    assert main(arguments) == main(arguments) == 0
    slice_teacher(file, tmp_path / "cut", num_stages=1, name=NAME, overrides=NUMBERS)
    assert main(["teacher", "inspect", str(tmp_path / "cut"), "--write"]) == 2
    assert "slice again" in capsys.readouterr().err


def test_an_existing_folder_is_not_overwritten(file, tmp_path):
    with refused("student", "cannot be written", "OUT"):
        blocked = tmp_path / "student"
        blocked.touch()
        slice_teacher(file, blocked / "cut", num_stages=1, name=NAME, overrides=NUMBERS)
    (tmp_path / "cut").mkdir()
    with refused(tmp_path / "cut", "exists"):
        slice_teacher(file, tmp_path / "cut", num_stages=1, name=NAME, overrides=NUMBERS)
