"""Whatever is killed at whatever moment, `latest` names a complete checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from unittest.mock import Mock

import pytest

from dmae_ds.config.run import CheckpointConfig
from dmae_ds.distributed import collectives
from dmae_ds.errors import RunFailed
from dmae_ds.train.checkpoint import folder as checkpoint_folder
from dmae_ds.train.checkpoint.folder import MUST_AGREE, OLDER, CheckpointFolder, Written, crc32_of
from dmae_ds.train.checkpoint.save import Checkpoints
from dmae_ds.train.ema import NoEmaTeacher
from tests.messages import refused

IDENTITY = {**dict.fromkeys(MUST_AGREE, 1), "world_size": 2, "zero_stage": 2}


def save(folder: CheckpointFolder, step: int, *, keep: int = 2, seal: bool = True, **more) -> None:
    folder.begin(step)
    path = folder.path / folder.tag(step) / "weights.pt"
    path.write_bytes(b"x" * step)
    if seal:
        folder.commit(step, {"step": step, **IDENTITY, **more}, {path.name: Written(step, crc32_of(path))})
        folder.prune(keep)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "run")


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.path.glob("step-*"))


def test_the_newest_committed_checkpoint_is_the_latest_and_old_ones_are_deleted(folder):
    assert folder.latest() is None
    for step in (5, 10, 15):
        save(folder, step)
    assert folder.latest().name == "step-00000015"
    assert names(folder) == ["step-00000010", "step-00000015"]


def test_a_killed_save_leaves_the_one_before_and_can_be_repeated(folder):
    save(folder, 5)
    save(folder, 10, seal=False)
    assert folder.read_state(folder.latest())["step"] == 5
    (folder.path / folder.tag(10) / "left over").write_bytes(b"of the killed one")
    save(folder, 10)
    assert sorted(folder.read_state(folder.latest())["files"]) == ["weights.pt"]


def test_what_killed_saves_left_is_ignored_and_deleted(folder):
    save(folder, 5)
    save(folder, 10, seal=False)
    save(folder, 15)
    assert names(folder) == ["step-00000005", "step-00000015"]  # keep=2, and both are complete


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL; no file is touched while Python unwinds."""


def test_killed_before_any_disk_operation_the_latest_is_complete(tmp_path, monkeypatch):
    """A third save, which deletes the first, is stopped before each of its disk operations."""
    done = -1

    def stop_at(limit: int) -> None:
        nonlocal done
        done = 0

        def counted(operation):
            def wrapper(*args, **kwargs):
                nonlocal done
                done += 1
                if done > limit:
                    raise Killed
                return operation(*args, **kwargs)

            return wrapper

        def rmtree(folder) -> None:  # in the worst order: state.json goes last
            for path in sorted(folder.iterdir(), reverse=True):
                os.unlink(path)
            os.rmdir(folder)

        monkeypatch.setattr(shutil, "rmtree", rmtree)
        for module, name in [
            (os, "replace"),
            (os, "fsync"),
            (os, "mkdir"),
            (os, "unlink"),
            (os, "rmdir"),
            (checkpoint_folder, "open"),
        ]:
            monkeypatch.setattr(module, name, counted(getattr(module, name, open)), raising=False)

    moved = set()
    for limit in range(1000):
        folder = CheckpointFolder(tmp_path / str(limit))
        save(folder, 5)
        save(folder, 10)
        stop_at(limit)
        try:
            save(folder, 15)
            finished = True
        except Killed:
            finished = False
        monkeypatch.undo()
        latest = folder.latest()
        folder.check_bytes(latest)
        moved.add(latest.name)
        for path in folder.all():  # with a state.json it is complete: nothing half-deleted is used
            folder.check_bytes(path)
        save(folder, 20)  # the next save cleans up
        assert len(names(folder)) == 2 and folder.latest().name == "step-00000020"
        if finished:
            break
    assert limit > 10 and moved == {"step-00000010", "step-00000015"}


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: (path / "weights.pt").write_bytes(b"short"), ["weights.pt", "5 bytes", "10"]),
        (lambda path: (path / "weights.pt").unlink(), ["weights.pt", "missing"]),
        (lambda path: (path / "state.json").unlink(), ["state.json"]),
        (lambda path: (path / "state.json").write_text("{"), ["state.json"]),
        (lambda path: (path / "state.json").write_text(json.dumps({"version": 99})), ["99", "2 and 3"]),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_way_out(folder, damage, words):
    save(folder, 10)
    damage(folder.path / "step-00000010")
    with refused(folder.path / "step-00000010", *words):
        folder.latest()


def test_the_way_back_is_the_newest_older_one_that_is_intact(folder):
    for step in (5, 10, 15, 20):
        save(folder, step, keep=9)
    for step in (20, 15):
        (folder.path / folder.tag(step) / "weights.pt").write_bytes(b"y" * step)
    folder.latest()  # the size is right
    with refused("weights.pt", "crc32", f"echo step-00000010 > {folder.path / 'latest'}"):
        folder.check_bytes(folder.latest())
    for step in (5, 10):
        (folder.path / folder.tag(step) / "weights.pt").unlink()
    with refused("weights.pt", "run.dir"):
        folder.check_bytes(folder.latest())


def test_several_readers_check_every_file_once(folder, monkeypatch):
    folder.begin(5)
    files = {}
    for name in "abcde":
        path = folder.path / folder.tag(5) / name
        path.write_bytes(name.encode())
        files[name] = Written(1, crc32_of(path))
    folder.commit(5, {"step": 5, **IDENTITY}, files)
    seen = []
    monkeypatch.setattr(
        checkpoint_folder, "crc32_of", lambda path: seen.append(path.name) or files[path.name].crc32
    )
    for part in range(3):
        folder.check_bytes(folder.latest(), part=part, parts=3)
    assert sorted(seen) == list("abcde")


def test_a_refusal_names_the_keys_that_differ_inside_a_section(folder):
    save(folder, 5, objective={"name": "a", "decoder": {"depth": 2, "embed_dim": 8}}, teacher=None)
    here = {
        "objective": {"name": "a", "decoder": {"depth": 4, "embed_dim": 8}, "alpha": 1.0},
        "teacher": None,
    }
    with refused("objective.decoder.depth 2", "this run 4", "objective.alpha unset", "1.0") as raised:
        folder.check_same_run(folder.latest(), {**IDENTITY, **here})
    assert "embed_dim" not in str(raised.value)


@pytest.mark.parametrize("key", MUST_AGREE)
def test_another_run_s_checkpoint_is_refused(folder, key):
    save(folder, 5)
    folder.check_same_run(folder.latest(), IDENTITY)
    with refused(f"{key} 1", "2", MUST_AGREE[key]):
        folder.check_same_run(folder.latest(), {**IDENTITY, key: 2})


@pytest.mark.parametrize(
    "written, run",
    [
        ({}, {"world_size": 4}),
        ({}, {"zero_stage": 3}),
        ({"zero_stage": 0}, {"world_size": 4}),
        ({"precision": "fp16"}, {"precision": "fp16"}),
    ],
)
def test_another_world_size_or_stage_may_continue(folder, written, run):
    save(folder, 5, **written)
    folder.check_same_run(folder.latest(), {**IDENTITY, **run})


def test_fp16_continues_only_as_it_was_written(folder):
    save(folder, 5, precision="fp16")
    with refused("fp16", "2 ranks", "ZeRO stage 2"):
        folder.check_same_run(folder.latest(), {**IDENTITY, "precision": "fp16", "world_size": 4})
    with refused("fp16", "optim.weight_decay", "optim.layer_decay"):
        folder.check_can_reshard(folder.latest(), {**IDENTITY, "precision": "fp16"})


def test_a_state_of_version_2_is_read_and_resharded_unless_it_lacks_the_names(folder):
    for stage in (2, 0):
        save(folder, 5)
        path = folder.path / folder.tag(5) / "state.json"
        path.write_text(
            json.dumps({"version": 2, "step": 5, **IDENTITY, "zero_stage": stage, "files": {"weights.pt": 5}})
        )
        folder.check_bytes(folder.latest())
        folder.check_same_run(folder.latest(), {**IDENTITY, "zero_stage": stage})
        if stage == 2:
            folder.check_same_run(folder.latest(), {**IDENTITY, "world_size": 1})
    with refused("optimizer", "2 ranks", "ZeRO stage 0"):
        folder.check_same_run(folder.latest(), {**IDENTITY, "zero_stage": 1})


def test_a_state_without_the_keys_of_today_is_read_as_what_it_meant(folder):
    """A state.json from before `order` and `repeat`, and with keys that are gone."""
    save(folder, 5)
    path = folder.path / folder.tag(5) / "state.json"
    newer = {*OLDER, "num_samples"}
    state = {key: value for key, value in json.loads(path.read_text()).items() if key not in newer}
    path.write_text(json.dumps({**state, "gone": 1}))
    folder.check_same_run(folder.latest(), {**IDENTITY, **OLDER})
    with refused("data.block", "order"):
        folder.check_same_run(folder.latest(), {**IDENTITY, **OLDER, "order": {"version": 1, "block": 2}})


def test_an_older_checkpoint_without_optimizer_state_for_the_positions_is_refused(folder):
    save(folder, 5)
    path = folder.path / folder.tag(5) / "state.json"
    state = {key: value for key, value in json.loads(path.read_text()).items() if key != "positions"}
    path.write_text(json.dumps(state))
    folder.check_same_run(folder.latest(), {**IDENTITY, "positions": "fixed"})
    with refused("positional embedding", "fixed", "optimizer state", "student.weights"):
        folder.check_same_run(folder.latest(), {**IDENTITY, "positions": "trained"})


def test_an_old_name_of_a_file_is_checked_like_any_other(folder):
    """Before December 2026 the EMA teacher's file was twin.safetensors; state.json lists files by name."""
    folder.begin(5)
    path = folder.path / folder.tag(5) / "twin.safetensors"
    path.write_bytes(b"weights")
    folder.commit(5, {"step": 5, **IDENTITY}, {path.name: Written(7, crc32_of(path))})
    folder.check_bytes(folder.latest())
    path.write_bytes(b"Weights")
    with refused("twin.safetensors", "crc32"):
        folder.check_bytes(folder.latest())


def test_a_save_that_does_not_fit_is_refused_before_it_starts(folder, monkeypatch):
    save(folder, 5)
    usage = shutil.disk_usage(folder.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4))
    with refused("step-00000005", "0.0 MiB", folder.path, error=RunFailed):
        folder.begin(10)
    folder.abandon(10)
    assert names(folder) == ["step-00000005"] and folder.latest().name == "step-00000005"


def test_a_save_that_fails_after_the_pointer_moved_stays(folder):
    save(folder, 5)
    folder.abandon(5)
    assert folder.latest().name == "step-00000005"


@pytest.mark.parametrize("problem", [None, "stale file handle"])
def test_a_failed_save_says_whether_its_files_could_be_deleted(folder, monkeypatch, problem):
    save(folder, 5)
    folder.begin(10)
    if problem is not None:
        monkeypatch.setattr(folder, "abandon", Mock(side_effect=OSError(problem)))
    monkeypatch.setattr(collectives, "broadcast_from_main", lambda value: value)
    saves = Checkpoints(
        folder, CheckpointConfig(), identity=IDENTITY, student_metadata={"": {}}, ema=NoEmaTeacher()
    )
    with pytest.raises(RunFailed) as raised:
        saves._abort_if("rank 1 has no space", step=10)
    text = str(raised.value)
    assert (
        "rank 1 has no space" in text
        and "None" not in text
        and ((problem or "stale") in text) == bool(problem)
    )
    assert (names(folder) == ["step-00000005"]) == (problem is None)
