"""`dmae-ds plan` proposes only commands that `dmae-ds train` accepts, and refuses only what it refuses.

The networks are replaced by numbers of about the right size, so that hundreds of plans take seconds; the
commands are read back with the command line's own parser and go through training's whole preflight.
"""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import torch

from dmae_ds.cli.main import build_parser
from dmae_ds.config.load import load_config
from dmae_ds.config.shipped import shipped_files
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.plan import search, table
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import scaled
from dmae_ds.train.preflight import Preflight, prepare
from tests.plan.conftest import geometry_of

GPUS = (1, 2, 6, 8, 64)
MEMORY_GIB = (2, 6, 12, 24, 80, 1000)


@pytest.fixture
def overrides(digits, tmp_path, monkeypatch) -> list[str]:
    """What a shipped recipe needs here: a data set, and files whose first bytes are those of weights."""

    def measure(config, micro_batch, *, device_type):
        assert device_type == "cuda"
        geometry = geometry_of(activations=3 * 10**9)  # of 16 images
        teachers = dict.fromkeys(config.named_teachers(), geometry.teachers[""])
        geometry = replace(geometry, teachers=teachers)
        return scaled(geometry, micro_batch)

    monkeypatch.setattr(search, "measure", measure)
    torch.save({}, tmp_path / "weights.pth")
    return [f"run.dir={tmp_path / 'run'}", f"data.train={digits / 'train'}", f"data.val={digits / 'val'}"]


LARGEST = "radio_like"  # takes as long as many others, and its placements are those of digits_two_teachers


def words_of(recipe: str, overrides: list[str], tmp_path) -> list[str]:
    config, weights = load_config(recipe, overrides), tmp_path / "weights.pth"
    teachers = config.named_teachers().values()
    here = [f"{teacher.key('pretrained')}=false" for teacher in teachers if teacher.pretrained]
    needed = [teacher.key("weights") for teacher in teachers]
    if config.students is None and config.student.weights is not None:
        needed.append("student.weights")
    return [*overrides, *here, *(f"{key}={weights}" for key in needed)]


def machine(gpus: int, memory_gib: float = 24) -> Machine:
    return Machine(gpus=gpus, gpus_per_node=min(gpus, 8) if gpus % 8 == 0 else gpus, memory_gib=memory_gib)


def plan(recipe: str, overrides: list[str], where: Machine) -> str:
    return table.plan(
        load_config(recipe, overrides), where, recipe=recipe, overrides=overrides, images=1_000_000
    )


def train(recipe: str, overrides: list[str], gpus: int) -> Preflight:
    return prepare(load_config(recipe, overrides), World(size=gpus, local_size=min(gpus, 8)), resume="never")


def command_in(text: str) -> tuple[str, list[str]] | None:
    """(recipe, overrides) of the command that a plan proposes; None where nothing fits."""
    lines = [line for line in text.splitlines() if line.startswith("deepspeed -q --")]
    if not lines:
        return None
    args = build_parser().parse_args(shlex.split(lines[0].partition("--module dmae_ds ")[2]))
    return args.recipe, args.overrides


@pytest.mark.parametrize(
    "recipe",
    [*sorted(set(shipped_files("recipe")) - {LARGEST}), pytest.param(LARGEST, marks=pytest.mark.slow)],
)
def test_train_accepts_the_command_that_plan_proposes(recipe, overrides, tmp_path):
    overrides = words_of(recipe, overrides, tmp_path)
    proposed = 0
    for gpus in GPUS:
        try:
            train(recipe, overrides, gpus)
        except UserError:
            with pytest.raises(UserError):
                plan(recipe, overrides, machine(gpus))
            continue
        for memory_gib in MEMORY_GIB:
            text = plan(recipe, overrides, machine(gpus, memory_gib))
            command = command_in(text)
            if command is None:
                continue
            preflight = train(*command, gpus)
            cut = f"{gpus} x {preflight.micro_batch} x {preflight.accumulation} accumulated"
            assert cut in text, (gpus, memory_gib)
            proposed += 1
    assert proposed >= 5


@pytest.mark.parametrize(
    "recipe, more",
    [
        ("dmae_vit_large_to_base", ["optim.micro_batch=100"]),
        ("mae_vit_base", ["optim.global_batch=1000", "optim.micro_batch=60"]),
        ("mae_vit_base", ["data.repeat=4", "optim.micro_batch=30"]),
        ("mocov3_vit_base", ["optim.micro_batch=512"]),
        ("mocov3_vit_base", ["optim.micro_batch=100"]),
        ("mocov3_dmae_vit_base", ["precision=bf16_autocast"]),
        ("mae_vit_base", ["precision=fp16", "deepspeed=zero0"]),
        ("dmae_vit_large_to_base", ["precision=fp16", "optim.clip_grad=1"]),
        ("g2sd_specific_from_scratch", ["optim.micro_batch=31"]),
        ("g2sd_specific_from_scratch", ["data.repeat=2"]),
        ("mae_vit_base", ["compile=true"]),
        ("mae_vit_base", ["compile=true", "deepspeed=zero3"]),
        ("dmae_vit_large_to_base", ["teacher.dtype=fp8"]),
        ("dmae_vit_large_to_base", ["objective.name=mae"]),
        ("mae_vit_base", ["objective.name=dmae"]),
    ],
)
def test_plan_and_train_accept_and_refuse_the_same(recipe, more, overrides, tmp_path):
    overrides = [*words_of(recipe, overrides, tmp_path), *more]
    for gpus in GPUS:
        try:
            expected = train(recipe, overrides, gpus)
        except UserError:
            with pytest.raises(UserError):
                plan(recipe, overrides, machine(gpus, 1000))
            continue
        for memory_gib in (6, 1000):
            command = command_in(plan(recipe, overrides, machine(gpus, memory_gib)))
            if command is not None:
                train(*command, gpus)
        assert command is not None and train(*command, gpus).micro_batch == expected.micro_batch


def test_a_deepspeed_file_that_fixes_the_micro_batch_is_not_proposed_with_another(overrides, tmp_path):
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 512}')
    overrides = [*overrides, f"deepspeed={own}", "optim.micro_batch=512"]
    recipe, proposed = command_in(plan("mae_vit_base", overrides, machine(8, 12)))
    assert train(recipe, proposed, 8).micro_batch < 512
