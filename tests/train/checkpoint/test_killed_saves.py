"""After SIGKILL in a save a run resumes from a complete checkpoint and ends bit for bit the same."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.train.checkpoint.folder import CheckpointFolder
from dmae_ds.train.checkpoint.student_file import NAMES, step_of
from tests.train.checkpoint.resharding import start, train
from tests.train.conftest import free_port, losses, run

KILLER = Path(__file__).with_name("killing_driver.py")
# The step that `latest` names after a kill in the save of step 4; that of step 2 is complete.
MOMENTS = {"files": 2, "written": 2, "sealed": 2, "moved": 4, "named": 4, "cleared": 4}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_in_a_save_and_resumed_is_bit_identical(tiny_recipe, tmp_path, ranks):
    recipe = [*tiny_recipe, "deepspeed=zero2"]

    def options(name: str) -> list[str]:
        return train(recipe, tmp_path / name, "checkpoint.every_steps=2", "checkpoint.keep=1")

    for moment, latest in MOMENTS.items():
        launcher = (
            [sys.executable]
            if ranks == 1
            else ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
        )
        done = run([*launcher, str(KILLER), moment, json.dumps(options(moment)[1:])], cwd=tmp_path)
        assert done.returncode == (-signal.SIGKILL if ranks == 1 else 1), done.stderr[-3000:]
        folder = CheckpointFolder(tmp_path / moment)
        assert folder.latest().name == folder.tag(latest), moment
        folder.check_bytes(folder.latest())
    start([options(name) for name in ("whole", *MOMENTS)], ranks=ranks, cwd=tmp_path)
    expected = load_file(tmp_path / "whole" / "student.safetensors")
    for moment in MOMENTS:
        found = load_file(tmp_path / moment / "student.safetensors")
        assert found.keys() == expected.keys() and all(
            torch.equal(found[name], expected[name]) for name in expected
        ), moment
        assert losses(tmp_path / moment) == losses(tmp_path / "whole")
        assert [path.name for path in (tmp_path / moment / "checkpoints").glob("step-*")] == [
            "step-00000006"
        ], moment
        assert not list((tmp_path / moment).rglob("*.tmp")), moment


@pytest.mark.slow
def test_exported_files_of_another_step_are_rewritten(tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    start([train(tiny_recipe, folder)], ranks=1, cwd=tmp_path)
    expected = {name: load_file(folder / name) for name in NAMES}
    for name in NAMES:
        (folder / name).unlink()  # what was loaded is memory-mapped
    (folder / "decoder.safetensors").write_bytes(b"half")
    start([train(tiny_recipe, folder)], ranks=1, cwd=tmp_path)  # nothing is left to train
    for name, tensors in expected.items():
        found = load_file(folder / name)
        assert found.keys() == tensors.keys() and all(
            torch.equal(found[key], tensor) for key, tensor in tensors.items()
        )
        assert step_of(folder / name) == 6
