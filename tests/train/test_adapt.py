"""`adapt`: a DINOv3 backbone from transformers' file, on ranks, after a kill, and back under its names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.evaluate.results import read_history
from dmae_ds.export.export import export
from tests.teacher.hf_networks import hf_networks
from tests.train.conftest import command, deepspeed, losses, run
from tests.train.test_resume import kill_at_step

DRIVER = Path(__file__).with_name("driver.py")
pytestmark = pytest.mark.slow
STEPS = 20
NUMBERS = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TWO_RANKS = {
    "zero2": ["deepspeed=zero2", "optim.micro_batch=4"],
    "zero3": ["deepspeed=zero3", "student.checkpoint_blocks=true"],
    "stream": ["deepspeed=zero2", "teacher.placement=pipeline", "teacher.stages=2"],
}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A small DINOv3 as transformers writes it."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    hf_networks(pytest.importorskip("transformers"))["hf-dinov3"]().model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tiny_recipe, released) -> list[str]:
    own = [f"student.{key}={value}" for key, value in NUMBERS.items()]
    own += [
        "student.name=vit_small_patch16_dinov3_qkvb",
        f"student.weights={released}",
    ]
    target = "{tap: tokens, student: tokens, head: norm_linear}"
    own += [f"objective={{name: adapt, anchor: 50, targets: [{target}]}}", "log.every_steps=1"]
    return [*tiny_recipe, *own, "checkpoint.every_steps=5", "optim.base_lr=3e-3"]


@pytest.fixture(scope="module")
def curves(recipe, tmp_path_factory) -> Path:
    """A folder with a run for every variant."""
    folder = tmp_path_factory.mktemp("curves")
    measured = ["eval.knn_every=1", "eval.knn_at_start=true", "eval.knn_labels=10%"]
    for start, variants in (
        ([sys.executable, DRIVER], {"alone": measured}),
        ([*deepspeed(2), DRIVER], TWO_RANKS),
    ):
        runs = [[*recipe, f"run.dir={folder / name}", *extra] for name, extra in variants.items()]
        done = run([*map(str, start), json.dumps(runs)], cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("variant", TWO_RANKS)
def test_two_ranks_zero3_and_a_stream_compute_what_one_process_does(curves, variant):
    alone = losses(curves / "alone")
    assert len(alone) == STEPS and alone[-1] < alone[0]
    assert losses(curves / variant) == pytest.approx(alone, rel=1e-5)


def test_the_anchor_is_the_released_network_and_begins_at_zero(curves, released):
    rows = [json.loads(line) for line in (curves / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["anchor"] == 0 < rows[-1]["anchor"]
    kept = load_file(curves / "zero3" / "checkpoints" / f"step-{STEPS:08d}" / "ema.safetensors")
    file = load_file(released / "model.safetensors")
    assert torch.equal(kept["student.reg_token"], file["embeddings.register_tokens"])
    assert torch.equal(kept["student.blocks.1.gamma_2"], file["layer.1.layer_scale2.lambda1"])
    assert [result["step"] for result in read_history(curves / "alone")] == [0, STEPS]


def test_it_goes_back_under_the_names_that_it_came_with(curves, released, tmp_path):
    out, card = export(curves / "alone", to="hf", out=tmp_path / "hf")
    assert card["check"]["largest"] <= 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (released, out))
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    assert not torch.equal(before["norm.weight"], after["norm.weight"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_bit_identical(recipe, released, tmp_path, ranks):
    file = tmp_path / "released"
    recipe = [word for word in recipe if not word.startswith("student.weights")]
    recipe += [f"student.weights={file}", "deepspeed=zero3" if ranks == 2 else "deepspeed=zero1"]
    file.symlink_to(released)
    runs = [tmp_path / "whole", tmp_path / "killed"]
    for run_dir in runs:
        words = ["train", *recipe, f"run.dir={run_dir}", "--resume", "auto"]
        if run_dir is runs[1]:
            kill_at_step(recipe, run_dir, 12, ranks=ranks, more=[])
            assert 5 <= int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step-")) < STEPS
        done = run(command(words, ranks=ranks), cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(runs[1]) == losses(runs[0])
    for name in ("student.safetensors", f"checkpoints/step-{STEPS:08d}/ema.safetensors"):
        whole, killed = (load_file(run_dir / name) for run_dir in runs)
        assert whole.keys() == killed.keys() and all(torch.equal(whole[key], killed[key]) for key in whole)
