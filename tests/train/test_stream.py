"""Training with the teacher in pipeline stages is training with it on every rank: the same losses, the same student."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import command, losses, run
from tests.train.test_resume import STREAM


def train(recipe, folder, *more):
    done = run(command(["train", *recipe, f"run.dir={folder}", *more], ranks=2), cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def same_student(first, second) -> bool:
    one, other = (load_file(folder / "student.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("deepspeed", ["zero2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero0", "zero1", "zero3"))])
def test_losses_and_student_are_those_of_a_replicated_teacher(tiny_recipe, tmp_path, deepspeed):
    train(tiny_recipe, tmp_path / "replicated", f"deepspeed={deepspeed}")
    said = train(tiny_recipe, tmp_path / "streamed", f"deepspeed={deepspeed}", *STREAM)
    assert "in 2 stages; this rank has stage 1, blocks 1-2" in said
    assert losses(tmp_path / "streamed") == losses(tmp_path / "replicated")
    assert same_student(tmp_path / "streamed", tmp_path / "replicated")


@pytest.mark.parametrize(
    "more, words",
    [
        (["teacher.placement=pipeline"], "a pipeline needs a number of stages"),
        (["teacher.stages=2"], "nothing else has one"),
        (["teacher.placement=pipeline", "teacher.stages=2"], "teacher.stages 2 does not divide the 1 ranks into groups; take one of 1"),
    ],
)
def test_stages_that_can_not_be_are_one_line(tiny_recipe, tmp_path, more, words):
    done = run(command(["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}", *more], ranks=1), cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert words in line
