"""A loss or a weight that is not finite stops every rank, says how to go on, and is followed by no save."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dmae_ds.config.run import CheckpointConfig
from dmae_ds.errors import RunFailed
from dmae_ds.train.checkpoint.folder import MUST_AGREE, CheckpointFolder
from dmae_ds.train.checkpoint.save import Checkpoints, collectives
from dmae_ds.train.ema import NoEmaTeacher
from tests.messages import refused
from tests.train.conftest import command, losses, run

NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
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
    assert latest in done.stderr and str(folder / "checkpoints" / "latest") in done.stderr


class OneEngine:
    """An engine that has weights and must not be asked to save."""

    def __init__(self, weights):
        self.weights = weights

    def full_weights(self):
        return self.weights


class Ema(NoEmaTeacher):
    def tensors(self):
        return {"head.weight": torch.tensor([1.0, NAN])}


def with_checkpoints(run_dir, *steps):
    folder = CheckpointFolder(run_dir)
    for step in steps:
        folder.begin(step)
        folder.commit(step, {"step": step, "position": step}, {})
    return folder


@pytest.mark.parametrize(
    "name, value, ema",
    [
        ("student.norm.bias", NAN, NoEmaTeacher()),
        ("student.cls_token", INFINITE, NoEmaTeacher()),
        ("decoder.weight", -INFINITE, NoEmaTeacher()),
        ("head.weight", 0.0, Ema()),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, name, value, ema):
    monkeypatch.setattr(collectives, "broadcast_from_main", lambda text: text)
    folder = with_checkpoints(tmp_path, 4, 6)
    weights = {"student.whole": torch.ones(3), name: torch.tensor([[1.0, value]])}
    checkpoints = Checkpoints(folder, CheckpointConfig(), identity={}, student_metadata={"": {}}, ema=ema)
    with refused("step 9", name, "step-00000006", "step-00000004", folder.path / "latest", error=RunFailed):
        checkpoints.save(OneEngine(weights), step=9, position=72)
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step-00000004", "step-00000006"]
    assert not list(tmp_path.glob("*.safetensors"))


def test_how_to_go_on_names_what_exists_and_what_it_names_works(tmp_path):
    assert "--resume auto" in CheckpointFolder(tmp_path).ways_on()
    folder = with_checkpoints(tmp_path, 2)
    assert "step-00000002" in folder.ways_on()
    folder = with_checkpoints(tmp_path, 4, 6)
    older, pointer = re.search(r"echo (\S+) > (\S+)$", folder.ways_on()).groups()
    with open(pointer, "w") as file:
        file.write(older + "\n")
    assert folder.latest().name == older == "step-00000004"
    assert folder.ways_on().endswith(f"echo step-00000002 > {pointer}")


@pytest.mark.parametrize(
    "saved, now, taken",
    [
        ("bf16_autocast", "fp32", True),
        ("fp32", "bf16_autocast", True),
        ("fp32", "fp32", True),
        ("bf16", "fp32", False),
        ("fp32", "fp16", False),
        ("bf16_autocast", "bf16", False),
    ],
)
def test_precisions_that_hold_the_same_state_continue_each_other(tmp_path, saved, now, taken):
    folder = CheckpointFolder(tmp_path)
    identity = {**dict.fromkeys(MUST_AGREE, 1), "world_size": 1, "zero_stage": 2}
    folder.begin(3)
    folder.commit(3, {"step": 3, "position": 3, **identity, "precision": saved}, {})
    if taken:
        folder.check_same_run(folder.latest(), {**identity, "precision": now})
    else:
        with refused("precision", saved, now):
            folder.check_same_run(folder.latest(), {**identity, "precision": now})
