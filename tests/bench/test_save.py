"""`dmae-ds bench save` writes real checkpoints and compares them with the bytes that must be kept."""

from __future__ import annotations

import re

import pytest

from dmae_ds.cli.main import main

TINY = ["deepspeed=zero1", "optim.global_batch=8", "optim.micro_batch=4"]


@pytest.mark.parametrize(
    "recipe, more",
    [
        ("digits_dmae", ["checkpoint.every_steps=10", "teacher.embed_dim=48", "teacher.num_heads=3"]),
        ("digits_sdae", ["checkpoint.every_minutes=null"]),
    ],
)
def test_bytes_are_those_of_the_state_and_nothing_stays(recipe, more, tmp_path, capsys):
    arguments = ["bench", "save", recipe, *TINY, *more, "--steps", "1", "--rounds", "1"]
    assert main([*arguments, "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 ranks x 4 x 2 images" in out and "zero1" in out
    total, deepspeed, plain, ratio, needed = (
        float(number)
        for number in re.search(
            r"([\d.]+) MiB = ([\d.]+) in .* \+ ([\d.]+) in .*; ([\d.]+) of the ([\d.]+)", out
        ).groups()
    )
    assert total == pytest.approx(deepspeed + plain, abs=0.2)
    assert ratio == pytest.approx(total / needed, rel=0.1)
    assert 1 <= ratio < 2
    has_steps, has_minutes = "every 10 steps" in out, "every 30 minutes" in out
    assert (has_steps, has_minutes) == ((True, True) if recipe == "digits_dmae" else (False, False))
    assert not list(tmp_path.iterdir())


def test_an_objective_that_taps_more_than_encoder_blocks_is_refused(tmp_path, capsys):
    assert main(["bench", "save", "digits_g2sd_generic", *TINY, "--folder", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "decoder/" in line
