"""Whatever is killed whenever, `latest` names a checkpoint that is whole."""

from __future__ import annotations

import json
import os
import shutil
from typing import NamedTuple

import pytest

from dmae_ds.errors import RunFailed, UserError
from dmae_ds.train.checkpoint import folder as checkpoint_folder
from dmae_ds.train.checkpoint.folder import MUST_AGREE, CheckpointFolder, Written, crc32_of

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


def test_the_newest_sealed_one_is_the_latest_and_old_ones_go(folder):
    assert folder.latest() is None
    for step in (5, 10, 15):
        save(folder, step)
    assert folder.latest().name == "step-00000015"
    assert names(folder) == ["step-00000010", "step-00000015"]


def test_a_save_that_was_killed_leaves_the_one_before_and_is_written_anew(folder):
    save(folder, 5)
    save(folder, 10, seal=False)
    assert folder.read_state(folder.latest())["step"] == 5
    (folder.path / folder.tag(10) / "left over").write_bytes(b"of the killed one")
    save(folder, 10)
    assert sorted(folder.read_state(folder.latest())["files"]) == ["weights.pt"]


def test_what_killed_saves_left_counts_for_nothing_and_goes(folder):
    save(folder, 5)
    save(folder, 10, seal=False)
    save(folder, 15)
    assert names(folder) == ["step-00000005", "step-00000015"]  # keep=2, and both are whole


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL; what Python does while it unwinds touches no file here."""


def test_killed_before_any_operation_on_the_disk_the_latest_is_whole(tmp_path, monkeypatch):
    """A third save deletes the first: stopped before its first operation, before its second, and so on to its last."""
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
        for path in folder.all():  # what has a state.json is whole, so nothing half-deleted is ever taken
            folder.check_bytes(path)
        save(folder, 20)  # and the next save clears up
        assert len(names(folder)) == 2 and folder.latest().name == "step-00000020"
        if finished:
            break
    assert limit > 10 and moved == {"step-00000010", "step-00000015"}


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: (path / "weights.pt").write_bytes(b"short"), "weights.pt has 5 bytes instead of 10"),
        (lambda path: (path / "weights.pt").unlink(), "weights.pt is missing"),
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


def test_the_way_back_is_the_newest_older_one_that_is_whole_to_the_last_byte(folder):
    for step in (5, 10, 15, 20):
        save(folder, step, keep=9)
    for step in (20, 15):
        (folder.path / folder.tag(step) / "weights.pt").write_bytes(b"y" * step)
    folder.latest()  # the size is right
    with pytest.raises(
        UserError,
        match=r"weights.pt is damaged: its crc32 is .*; step-00000010 before it is whole; to take that: echo step-00000010 > .*/latest$",
    ):
        folder.check_bytes(folder.latest())
    for step in (5, 10):
        (folder.path / folder.tag(step) / "weights.pt").unlink()
    with pytest.raises(UserError, match="no older one is whole"):
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


@pytest.mark.parametrize("key", MUST_AGREE)
def test_another_run_s_checkpoint_is_refused(folder, key):
    save(folder, 5)
    folder.check_same_run(folder.latest(), IDENTITY)
    with pytest.raises(UserError, match=f"has {key} 1, this run 2; {MUST_AGREE[key][:20]}"):
        folder.check_same_run(folder.latest(), {**IDENTITY, key: 2})


class Move(NamedTuple):
    """What is written, what reads it, and words of the refusal."""

    written: dict
    run: dict
    refused: str | None


@pytest.mark.parametrize(
    "move",
    [
        Move({}, {"world_size": 4}, None),
        Move({}, {"zero_stage": 3}, None),
        Move({"zero_stage": 0}, {"world_size": 4}, None),
        Move({"precision": "fp16"}, {"precision": "fp16"}, None),
        Move(
            {"precision": "fp16"},
            {"precision": "fp16", "world_size": 4},
            "the loss scale of fp16, .*; start with 2 ranks with ZeRO stage 2, as it was written",
        ),
    ],
)
def test_another_world_size_or_stage_may_go_on_where_everything_moves(folder, move):
    save(folder, 5, **move.written)
    if move.refused is None:
        folder.check_same_run(folder.latest(), {**IDENTITY, **move.run})
        return
    with pytest.raises(UserError, match=move.refused):
        folder.check_same_run(folder.latest(), {**IDENTITY, **move.run})


def test_a_checkpoint_from_before_checksums_is_read_and_moves_unless_it_lacks_the_names(folder):
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
    with pytest.raises(UserError, match="did not note which optimiser state is whose"):
        folder.check_same_run(folder.latest(), {**IDENTITY, "zero_stage": 1})


def test_a_save_that_can_not_fit_is_refused_before_it_starts(folder, monkeypatch):
    save(folder, 5)
    usage = shutil.disk_usage(folder.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4))
    with pytest.raises(RunFailed, match="step-00000005 took 0.0 MiB and 0.0 MiB are free"):
        folder.begin(10)
    folder.abandon(10)
    assert names(folder) == ["step-00000005"] and folder.latest().name == "step-00000005"


def test_a_save_that_fails_after_the_pointer_moved_stays(folder):
    save(folder, 5)
    folder.abandon(5)
    assert folder.latest().name == "step-00000005"
