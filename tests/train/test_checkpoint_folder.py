"""Whatever is killed whenever, `latest` names a checkpoint that is whole."""

from __future__ import annotations

import json

import pytest

from dmae_ds.errors import UserError
from dmae_ds.train.checkpoint_folder import MUST_AGREE, CheckpointFolder

IDENTITY = dict.fromkeys(MUST_AGREE, 1)


def save(folder: CheckpointFolder, step: int, *, keep: int = 2, seal: bool = True) -> None:
    folder.begin(step)
    (folder.path / folder.tag(step) / "weights.pt").write_bytes(b"x" * step)
    if seal:
        folder.commit(step, {"step": step, **IDENTITY}, keep=keep)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "run")


def test_the_newest_sealed_one_is_the_latest_and_old_ones_go(folder):
    assert folder.latest() is None
    for step in (5, 10, 15):
        save(folder, step)
    assert folder.latest().name == "step-00000015"
    assert sorted(path.name for path in folder.path.glob("step-*")) == ["step-00000010", "step-00000015"]


def test_a_save_that_was_killed_leaves_the_one_before_and_is_written_anew(folder):
    save(folder, 5)
    save(folder, 10, seal=False)
    assert folder.read_state(folder.latest())["step"] == 5
    (folder.path / folder.tag(10) / "left over").write_bytes(b"of the killed one")
    save(folder, 10)
    assert sorted(folder.read_state(folder.latest())["files"]) == ["weights.pt"]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: (path / "weights.pt").write_bytes(b"short"), "weights.pt has 5 bytes instead of 10"),
        (lambda path: (path / "weights.pt").unlink(), "weights.pt has None bytes instead of 10"),
        (lambda path: (path / "state.json").unlink(), "no readable state.json"),
        (lambda path: (path / "state.json").write_text("{"), "no readable state.json"),
        (lambda path: (path / "state.json").write_text(json.dumps({"version": 99})), "format version 99"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_way_out(folder, damage, words):
    save(folder, 10)
    damage(folder.path / "step-00000010")
    with pytest.raises(UserError, match=words):
        folder.latest()


@pytest.mark.parametrize("key", MUST_AGREE)
def test_another_run_s_checkpoint_is_refused(folder, key):
    save(folder, 5)
    folder.check_same_run(folder.latest(), IDENTITY)
    with pytest.raises(UserError, match=f"has {key} 1, this run 2; {MUST_AGREE[key][:20]}"):
        folder.check_same_run(folder.latest(), {**IDENTITY, key: 2})
