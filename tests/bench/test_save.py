"""`dmae-ds bench save` writes real checkpoints and compares them with the bytes that must be kept."""

from __future__ import annotations

import re

import pytest

from dmae_ds.bench.save import _Result, _share_of_run
from dmae_ds.cli.main import main
from dmae_ds.config.run import CheckpointConfig
from tests.train.conftest import command, run

TINY = ["deepspeed=zero1", "optim.global_batch=8", "optim.micro_batch=4"]


def test_bytes_are_those_of_the_state_and_nothing_stays(tmp_path):
    """A recipe with a frozen teacher and an EMA teacher, whose weights are saved as well."""
    recipe = ["digits_dino_dmae", *TINY, "teacher.embed_dim=48", "teacher.num_heads=3"]
    arguments = ["bench", "save", *recipe, "--steps", "1", "--rounds", "1", "--folder", str(tmp_path)]
    done = run(command(arguments, ranks=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 ranks x 4 x 2 images" in done.stdout and "zero1" in done.stdout
    sizes = re.search(
        r"([\d.]+) MiB = ([\d.]+) in .* \+ ([\d.]+) in .*; ([\d.]+) of the ([\d.]+)", done.stdout
    )
    total, deepspeed, plain, ratio, needed = map(float, sizes.groups())
    assert total == pytest.approx(deepspeed + plain, abs=0.2)
    assert ratio == pytest.approx(total / needed, rel=0.1)
    assert 1 < ratio < 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "checkpoint, shares",
    [
        ({"every_minutes": None}, []),
        ({"every_minutes": 1}, ["9.091%"]),
        ({"every_minutes": None, "every_steps": 4}, ["60.000%"]),
        ({"every_minutes": 1, "every_steps": 4}, ["9.091%", "60.000%"]),
    ],
)
def test_the_share_of_a_run_is_that_of_the_recipe_s_saves(checkpoint, shares):
    result = _Result(step_s=1.0, save_s=6.0, write_s=3.0, deepspeed_bytes=0, plain_bytes=0)
    assert re.findall(r"[\d.]+%", _share_of_run(CheckpointConfig(**checkpoint), result)) == shares


def test_an_objective_that_taps_more_than_encoder_blocks_is_refused(tmp_path, capsys):
    assert main(["bench", "save", "digits_g2sd_generic", *TINY, "--folder", str(tmp_path)]) == 2
    assert "decoder/" in capsys.readouterr().err.splitlines()[-1]
