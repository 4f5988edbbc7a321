"""A new objective takes one class and one recipe: everything that toy.py declares works, with any ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.config.load import load_config
from dmae_ds.distributed.world import World
from dmae_ds.plan.geometry import measure
from dmae_ds.train.checkpoint.ema_file import FILE, OLD_FILE
from dmae_ds.train.preflight import prepare
from tests.messages import refused
from tests.train.conftest import command, deepspeed, losses, metrics, run
from tests.train.test_resume import kill_at_step

RECIPE = str(Path(__file__).with_name("toy.yaml"))
DRIVER = Path(__file__).with_name("driver.py")
PARTS = ["loss", "align", "views", "labels"]


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> list[str]:
    paths = [word for word in tiny_recipe if word.startswith(("data.train=", "teacher.weights="))]
    return [RECIPE, *paths, "data.num_workers=0", f"optim.epochs={20 * 16 / 1400}"]


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text()


def test_everything_that_it_declares_is_used(recipe, tmp_path):
    done = run(
        command(
            [
                "train",
                *recipe,
                f"run.dir={tmp_path / 'run'}",
                f"optim.epochs={6 * 16 / 1400}",
                "optim.warmup_epochs=.02",
            ],
            ranks=1,
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {line.split()[0]: line for line in done.stderr.splitlines() if line.strip()}
    assert "student, head" in rows["ema"] and "every step" in rows["ema"]
    assert all(word in rows["views"] for word in ("24 px", "0.1", "0.5", "dino2"))
    lines = metrics(tmp_path / "run")
    assert [list(line)[3:7] for line in lines] == [PARTS] * 6
    ema = load_file(newest(tmp_path / "run") / "ema.safetensors")
    student = load_file(tmp_path / "run" / "student.safetensors")
    assert "state/centre" in ema and float(ema["state/centre"].abs().max()) > 0
    # A frozen weight is a constant of the EMA teacher too.
    assert "patch_embed.proj.weight" in student and "student.patch_embed.proj.weight" not in ema
    moved = [
        name
        for name in student
        if f"student.{name}" in ema and not torch.equal(student[name], ema[f"student.{name}"])
    ]
    assert len(moved) > 40


def test_its_cost_is_known_from_its_needs_alone(recipe):
    config = load_config(recipe[0], recipe[1:])
    geometry = measure(config, 4)
    assert geometry.ema.flops > 0
    assert geometry.ema.weight_bytes > 4 * 32 * 32 and geometry.ema.feature_bytes == 4 * 8 * 4
    assert geometry.batch_bytes > 4 * 3 * (32**2 + 24**2) * (1 + 4)  # both views, as read and as floats
    assert measure(config, 8).ema.flops == 2 * geometry.ema.flops


def test_shards_without_labels_are_refused_before_training(recipe, tmp_path):
    name, *overrides = [*recipe, f"run.dir={tmp_path / 'run'}"]
    prepare(load_config(name, overrides), World(), resume="never")
    unindexed = [*overrides, "data.num_samples=1000", f"data.train={loose_tars(tmp_path)}"]
    with refused("labels", "data.num_samples"):
        prepare(load_config(name, unindexed), World(), resume="never")


def loose_tars(folder: Path) -> Path:
    (folder / "loose").mkdir()
    (folder / "loose" / "a.tar").write_bytes(bytes(1024))
    return folder / "loose"


@pytest.mark.parametrize(
    "override, words",
    [
        ("objective.name=tests.train.toy:Nothing", ["tests.train.toy:Nothing", "import"]),
        ("objective.name=tests.train.toy:ToyBatch", ["tests.train.toy:ToyBatch", "schema"]),
        ("objective.every=hour", ["every", "'step' or 'epoch'"]),
        ("objective.evry=step", ["evry"]),
    ],
)
def test_its_section_is_checked_like_any_other(recipe, override, words):
    with refused(*words):
        load_config(recipe[0], [*recipe[1:], override])


VARIANTS = {
    "zero0": ["deepspeed=zero0"],
    "zero2": ["deepspeed=zero2"],
    "zero3": ["deepspeed=zero3"],
    "zero3_bf16": ["deepspeed=zero3", "precision=bf16"],
}


@pytest.mark.slow
def test_one_process_two_ranks_and_zero_3_agree(recipe, tmp_path):
    launcher = [*deepspeed(2), DRIVER]
    for start, variants in (([sys.executable, DRIVER], {"alone": ["deepspeed=zero0"]}), (launcher, VARIANTS)):
        recipes = [[*recipe, f"run.dir={tmp_path / name}", *extra] for name, extra in variants.items()]
        done = run([*map(str, start), json.dumps(recipes)], cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    expected, ema = losses(tmp_path / "alone"), load_file(newest(tmp_path / "alone") / "ema.safetensors")
    assert len(expected) == 20 and expected[-1] < 0.8 * expected[0]
    for name in ("zero0", "zero2", "zero3"):
        torch.testing.assert_close(
            torch.tensor(losses(tmp_path / name)), torch.tensor(expected), rtol=1e-5, atol=1e-5
        )
        found = load_file(newest(tmp_path / name) / "ema.safetensors")
        for key in ema:
            if key.endswith("attn.qkv.bias"):  # see test_same_curve.py
                continue
            torch.testing.assert_close(
                found[key],
                ema[key],
                rtol=1e-3,
                atol=1e-4,
                msg=lambda text, key=key, name=name: f"{name}, {key}: {text}",
            )
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "zero3_bf16")), torch.tensor(expected), rtol=0.05, atol=0.05
    )


def rename_as_before(checkpoint: Path) -> None:
    """Give the EMA teacher's file the name that it had before December 2026."""
    (checkpoint / FILE).rename(checkpoint / OLD_FILE)
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][OLD_FILE] = state["files"].pop(FILE)
    (checkpoint / "state.json").write_text(json.dumps(state))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, more", [(1, []), (2, ["deepspeed=zero3"])], ids=["alone", "2 ranks, ZeRO-3"])
def test_killed_and_resumed_with_its_ema_teacher_is_bit_identical(recipe, tmp_path, ranks, more):
    more = [
        f"optim.epochs={30 * 16 / 1400}",
        "log.every_steps=1",
        "checkpoint.every_steps=5",
        "checkpoint.keep=2",
        *more,
    ]
    arguments = ["train", *recipe, *more]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(command([*arguments, f"run.dir={whole}"], ranks=ranks), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    kill_at_step(recipe, killed, 12, ranks=ranks, more=more)
    assert int(newest(killed).name.removeprefix("step-")) < 30
    if ranks == 1:
        rename_as_before(newest(killed))
    done = run(command([*arguments, f"run.dir={killed}", "--resume", "auto"], ranks=ranks), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(killed) == losses(whole)
    for name in ("student.safetensors", "decoder.safetensors"):
        expected, found = load_file(whole / name), load_file(killed / name)
        assert set(expected) == set(found) and all(torch.equal(expected[key], found[key]) for key in expected)
    expected, found = (load_file(newest(folder) / "ema.safetensors") for folder in (whole, killed))
    assert set(expected) == set(found) and all(torch.equal(expected[key], found[key]) for key in expected)
