"""`dmae-ds plan` as a user meets it: a table, a command that parses, one line for every mistake."""

from __future__ import annotations

import re
import shlex

import pytest

from dmae_ds.cli.main import main, parser
from dmae_ds.config.load import load_config

TINY = [
    "digits_dmae",
    "data.train=nowhere",
    "teacher.weights=nowhere",
    "teacher.embed_dim=48",
    "teacher.depth=8",
    "teacher.num_heads=3",
    "student.embed_dim=32",
    "student.num_heads=2",
]


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_plan_is_whole_and_its_command_is_one_that_runs(capsys):
    code, out, _ = run(
        capsys, *TINY, "deepspeed=zero3", "--gpus", "4", "--gpus-per-node", "4", "--gpu-memory-gib", "16"
    )
    assert code == 0 and "predicted; never measured on a GPU" in out
    rows = [line.split() for line in out.splitlines() if re.match(r"(replicated|pipeline|zero3) ", line)]
    assert len(rows) == 16 and {row[1] for row in rows if row[0] == "pipeline"} == {"P=2", "P=4"}
    assert rows[0][1] == "zero3"  # the recipe's own file first
    assert "1,281,167 images (ImageNet-1k's" in out
    command = next(line for line in out.splitlines() if line.startswith("deepspeed "))
    arguments = shlex.split(command.partition("--module dmae_ds ")[2])
    args = parser().parse_args(arguments)
    config = load_config(args.recipe, args.overrides)
    assert (
        config.teacher.placement == "replicated"
        and config.student.embed_dim == 32
        and command.startswith("deepspeed --num_gpus 4 ")
    )
    assert sum("deepspeed=" in word for word in arguments) == 1


def test_a_micro_batch_that_fits_is_found_and_stands_in_the_command(capsys):
    _, out, _ = run(
        capsys,
        *TINY,
        "optim.global_batch=4096",
        "optim.micro_batch=1024",
        "--gpus",
        "2",
        "--gpu-memory-gib",
        "3.2",
    )
    found = re.search(r"nothing fits with optim.micro_batch=1024; (\d+) is the largest", out)
    assert found and f"optim.micro_batch={found[1]}" in out.splitlines()[-3]
    assert f"2 x {found[1]} x {2048 // int(found[1])} accumulated" in out


def test_where_nothing_ever_fits_the_least_is_named(capsys):
    code, out, _ = run(capsys, *TINY, "--gpus", "2", "--gpu-memory-gib", "0.5")
    assert (
        code == 0
        and "nothing fits, down to optim.micro_batch=1: the least is" in out
        and "deepspeed --" not in out
    )


def test_a_recipe_without_a_teacher_is_the_student_alone_and_images_may_be_given(capsys):
    code, out, _ = run(
        capsys, "digits_mae", "data.train=nowhere", "--gpus", "16", "--gpus-per-node", "8", "--images", "6400"
    )
    assert code == 0 and "no teacher" in out and "pipeline" not in out and "teacher.placement" not in out
    assert "6,400 images (--images); " in out and "--hostfile" in out


def test_images_are_counted_from_the_manifest(capsys, digits):
    _, out, _ = run(capsys, "digits_mae", f"data.train={digits / 'train'}", "--gpus", "2")
    assert f"1,400 images (the manifest of {digits / 'train'})" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([*TINY, "--gpus", "12", "--gpus-per-node", "8"], "--gpus 12 is not a multiple of --gpus-per-node 8"),
        ([*TINY, "--gpus", "0"], "--gpus is 0; give a number above 0"),
        ([*TINY, "--gpu-memory-gib", "-1"], "--gpu-memory-gib is -1"),
        ([*TINY, "--tflops", "0"], "--tflops is 0"),
        (["digits_mae", "--images", "0"], "--images is 0"),
        ([*TINY, "--gpus", "3"], "optim.global_batch 64"),
        (["no_such_recipe"], "recipe 'no_such_recipe' is neither a file nor a shipped name"),
        ([*TINY, "student.depht=2"], "did you mean student.depth?"),
        ([*TINY, "teacher.patch_size=8"], "one mask can't serve both"),
        ([*TINY, "deepspeed=zero9"], "DeepSpeed file 'zero9' is neither"),
        ([*TINY, "objective.name=mae"], "objective mae"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    (line,) = err.strip().splitlines()
    assert code == 2 and out == "" and words in line
