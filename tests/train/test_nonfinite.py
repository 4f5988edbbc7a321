"""A loss that is not finite stops every rank, names step and samples, and is followed by no save."""

from __future__ import annotations

import json
import re

import pytest

from tests.train.conftest import command, losses, run


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_with_an_infinite_loss_names_the_step_and_keeps_the_last_checkpoint(
    tiny_recipe, tmp_path, ranks
):
    folder = tmp_path / "run"
    arguments = [
        "train",
        *tiny_recipe,
        f"run.dir={folder}",
        "optim.base_lr=1e30",
        "optim.warmup_epochs=0",
        "checkpoint.every_steps=1",
    ]
    done = run(command(arguments, ranks=ranks), cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    found = re.findall(
        r"dmae-ds: error: .*step (\d+) is not finite; .*: rank (\d): ([\d, ]+)",
        done.stderr,
    )
    assert len(found) == 1, done.stderr
    step, _, ids = found[0]
    assert all(0 <= int(number) < 1400 for number in ids.split(","))
    assert len(losses(folder)) == int(step) - 1  # the finite steps, and they alone, were written
    latest = (folder / "checkpoints" / "latest").read_text()
    assert json.loads((folder / "checkpoints" / latest / "state.json").read_text())["step"] == int(step) - 1
