"""`dmae-ds bench cache` compares a step from stored features with the live one, and reads with plain ones."""

from __future__ import annotations

import pytest

from tests.train.conftest import command, run

DIGITS = ["bench", "cache", "digits_dmae", "optim.global_batch=8", "--rounds", "1"]


@pytest.mark.slow
def test_every_dtype_has_a_row_and_bytes_are_those_of_the_taps(tmp_path):
    done = run(command([*DIGITS, "--folder", str(tmp_path)], ranks=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    sizes = {row[1]: int(row[2].replace(",", "")) for row in rows if row[0] == "stored,"}
    assert sizes == {"fp32": 17 * 128 * 4, "bf16": 17 * 128 * 2, "int8": 17 * (128 + 4)}
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_a_teacher_is_one_line(tmp_path, capsys):
    from dmae_ds.cli.main import main

    assert main(["bench", "cache", "mae_vit_base"]) == 2
    assert "bench cache" in capsys.readouterr().err
