"""Mistakes that `dmae-ds train` refuses with one line and exit code 2; nothing is lost."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dmae_ds.config.load import dump_config, load_config
from dmae_ds.distributed.world import World
from dmae_ds.train.checkpoint.folder import TEACHER_WEIGHTS
from dmae_ds.train.preflight import prepare
from tests.messages import refused
from tests.train.conftest import command, environment, refusal, run


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["objective.maskratio=.9"], ["objective.maskratio", "objective.mask_ratio"]),
        (["data.train=nowhere"], ["data.train", "nowhere"]),
        (["objective.mask_ratio=1"], ["objective", "mask_ratio", "less than 1"]),
        (["deepspeed=zero4"], ["zero4", "zero3"]),
        (["teacher.weights=none.pth"], ["teacher.weights", "none.pth"]),
        (["teacher=null"], ["dmae", "teacher"]),
        (["objective={name: mae}"], ["objective", "mae"]),
    ],
)
def test_mistakes_in_a_recipe(tiny_recipe, tmp_path, overrides, words):
    line = refusal(["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}", *overrides], tmp_path)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_misspelt_deepspeed_key(tiny_recipe, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimisation": {"stage": 2}}))
    arguments = ["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}", "deepspeed=mine.json"]
    line = refusal(arguments, tmp_path)
    assert "zero_optimisation" in line and "zero_optimization" in line


def test_a_ranks_line_and_its_end_are_one_write(tmp_path):
    """Unbuffered, as launchers start ranks, so that the lines of two ranks that stop at once stay apart."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a packet is a write
    with ours, its:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "dmae_ds", "train", "nowhere.yaml"],
            cwd=tmp_path,
            env=environment(),
            stderr=its,
            timeout=100,
        )
        packet = ours.recv(10_000, socket.MSG_DONTWAIT).decode()
    assert done.returncode == 2
    assert packet.startswith("dmae-ds: error: ") and packet.endswith("\n")


def test_mistakes_are_found_without_torch(tiny_recipe, tmp_path):
    """They take less than two seconds, because torch and timm, slow to import, are not imported."""
    code = """
import json, sys
from dmae_ds.cli.main import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 2, arguments
    heavy = {"torch", "timm", "deepspeed", "accelerate", "webdataset"} & set(sys.modules)
    assert not heavy, (heavy, arguments)
"""
    run = tmp_path / "made"
    (run / "export" / "timm").mkdir(parents=True)
    config = load_config(tiny_recipe[0], [*tiny_recipe[1:], f"run.dir={run}", "data.val=null"])
    (run / "config.yaml").write_text(dump_config(config))
    np.savez(tmp_path / "arrays.npz", np.zeros(3))
    train = ["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}"]
    wanted = {
        "zero4": [*train, "deepspeed=zero4"],
        "[1, 1, 48], expected [1, 1, 96]": [*train, "teacher.embed_dim=96"],
        ".npz": [*train, f"teacher.weights={tmp_path / 'arrays.npz'}"],
        "student.weights": [*train, f"student.weights={tmp_path / 'arrays.npz'}"],
        "student.safetensors": ["eval", "knn", str(run)],
        "exists already": ["export", str(run), "--to", "timm"],
        "is not a folder": ["export", str(tmp_path / "nowhere"), "--to", "timm"],
    }

    def refuse(wanted: dict[str, list[str]]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(list(wanted.values()))],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        for word, line in zip(wanted, done.stderr.splitlines(), strict=True):
            assert word in line, line

    refuse(wanted)
    (run / "student.safetensors").touch()
    refuse({"data.val is null": ["eval", "probe", str(run)]})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tensors: tensors.pop("blocks.1.mlp.fc1.weight"), ["blocks.1.mlp.fc1.weight"]),
        (
            lambda tensors: tensors.update({"cls_token": torch.zeros(1, 1, 47)}),
            ["cls_token", "[1, 1, 47]", "[1, 1, 48]"],
        ),
    ],
)
def test_a_teacher_file_that_does_not_fit(tiny_recipe, tmp_path, change, words):
    weights = next(value for value in tiny_recipe if value.startswith("teacher.weights="))
    tensors = load_file(weights.removeprefix("teacher.weights="))
    change(tensors)
    broken = tmp_path / "broken.safetensors"
    save_file(tensors, broken)
    arguments = ["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}", f"teacher.weights={broken}"]
    line = refusal(arguments, tmp_path)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_two_ranks_print_one_line_and_the_launcher_returns_the_exit_code(tiny_recipe, tmp_path):
    done = run(
        command(["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}", "optim.global_batch=3"], ranks=2),
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.count("dmae-ds: error") == 1
    assert "optim.global_batch 3" in done.stderr and "1 or 3 ranks" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_is_not_overwritten(tiny_recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("precious")
    (tmp_path / "run" / "student.safetensors").write_text("precious")
    assert "--resume auto" in refusal(["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}"], tmp_path)
    assert (tmp_path / "run" / "config.yaml").read_text() == "precious"


def test_a_run_whose_newest_checkpoint_is_not_named_does_not_start_again(tiny_recipe, tmp_path):
    """--resume auto starts again only where a run ended before its first checkpoint."""
    run_dir = tmp_path / "run"
    config = load_config(tiny_recipe[0], [*tiny_recipe[1:], f"run.dir={run_dir}"])
    began = prepare(config, World(), resume="auto")
    run_dir.mkdir()
    for name in ("config.yaml", "results.jsonl"):  # k-NN has been measured
        (run_dir / name).touch()
    assert prepare(config, World(), resume="auto").resume_from is None
    pointer = run_dir / "checkpoints" / "latest"
    for step in (3, 6):
        began.folder.begin(step)
        began.folder.commit(step, {"step": step, "position": 16 * step, **began.identity}, {})
        pointer.unlink()
        if step == 3:  # killed in the first save, before its end
            assert prepare(config, World(), resume="auto").resume_from is None
    with refused("run.dir", f"echo step-00000006 > {pointer}"):
        prepare(config, World(), resume="auto")
    pointer.write_text("step-00000006")
    assert prepare(config, World(), resume="auto").resume_from.name == "step-00000006"
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "student.safetensors").touch()
    with refused("another run.dir", pointer):
        prepare(config, World(), resume="auto")


def test_an_incomplete_set_of_rank_variables_is_refused(monkeypatch):
    from dmae_ds.distributed.world import world_from_env

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_env() == World()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        world_from_env()


def test_the_micro_batch_of_a_resumed_run_is_at_most_the_previous_one(tiny_recipe, tmp_path):
    config = load_config(tiny_recipe[0], [*tiny_recipe[1:], f"run.dir={tmp_path / 'run'}"])
    before = prepare(config, World(size=2, local_size=2), resume="never")
    assert (before.micro_batch, before.accumulation) == (8, 1)
    before.folder.begin(5)
    before.folder.commit(5, {"step": 5, "position": 80, **before.identity}, {})
    for ranks, expected in ((1, (8, 2)), (2, (8, 1)), (4, (4, 1))):
        after = prepare(config, World(size=ranks, local_size=ranks), resume="auto")
        assert (after.micro_batch, after.accumulation) == expected
    assert prepare(config, World(), resume="never").micro_batch == 16


@pytest.mark.parametrize("precision", ["fp32", "bf16_autocast"])
def test_a_resumed_run_keeps_the_teachers_dtype_with_which_it_began(tiny_recipe, tmp_path, precision):
    def prepared(*overrides, resume):
        config = load_config(tiny_recipe[0], [*tiny_recipe[1:], f"run.dir={tmp_path / 'run'}", *overrides])
        return prepare(config, World(), resume=resume)

    began = prepared("precision=fp32", resume="never")
    began.folder.begin(3)
    began.folder.commit(3, {"step": 3, "position": 48, **began.identity}, {})
    again = prepared(f"precision={precision}", resume="auto")
    assert again.resume_from is not None and again.config.teacher.dtype == "fp32"
    with refused("teacher.dtype fp32", "bf16"):
        prepared(f"precision={precision}", "teacher.dtype=bf16", resume="auto")


def test_a_run_continues_with_the_teacher_s_weights_wherever_they_are(tiny_recipe, tmp_path):
    name = next(value for value in tiny_recipe if value.startswith("teacher.weights="))
    given = Path(name.removeprefix("teacher.weights="))
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    moved.write_bytes(given.read_bytes())
    save_file({key: tensor + 1 for key, tensor in load_file(given).items()}, other)

    def prepared(weights, resume="auto"):
        overrides = [*tiny_recipe[1:], f"run.dir={tmp_path / 'run'}", f"teacher.weights={weights}"]
        return prepare(load_config(tiny_recipe[0], overrides), World(), resume=resume)

    began = prepared(given, resume="never")
    state = {"step": 3, "position": 48, **began.identity}
    began.folder.begin(3)
    began.folder.commit(3, state, {})
    assert prepared(moved).is_resumed
    with refused("teacher.weights", str(began.identity[TEACHER_WEIGHTS]["teacher.weights in format timm"])):
        prepared(other)
    moved.write_bytes(other.read_bytes())
    with refused("teacher.weights", "run.dir"):
        prepared(moved)
    del state[TEACHER_WEIGHTS]  # an earlier version's
    began.folder.commit(3, state, {})
    assert prepared(other).is_resumed
