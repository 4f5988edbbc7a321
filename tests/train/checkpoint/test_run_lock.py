"""A run folder has one owner at a time and is the same folder for every rank."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dmae_ds.distributed.world import World
from dmae_ds.train import run
from dmae_ds.train.checkpoint import run_lock
from dmae_ds.train.checkpoint.folder import MUST_AGREE, CheckpointFolder
from tests.messages import refused

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.truncate(0)
file.write('{"host": "node-z", "pid": 4711, "since": "yesterday"}')
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(run_lock.collectives, "raise_on_all_ranks", lambda step: step())
    monkeypatch.setattr(run_lock.collectives, "is_main", lambda: True)
    monkeypatch.setattr(run_lock.collectives, "broadcast_from_main", lambda value: value)
    monkeypatch.setattr(run_lock, "WAIT_S", 0.3)
    monkeypatch.setattr(run_lock, "VISIBLE_S", 0.3)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_with_the_name_of_its_owner(tmp_path, holder):
    with refused("run.dir", tmp_path, 4711, "node-z", "yesterday"):
        run_lock.claim(tmp_path)


def test_a_killed_owner_does_not_keep_the_folder(tmp_path, holder):
    holder.kill()
    holder.wait()
    lock = run_lock.claim(tmp_path)
    owner = json.loads((tmp_path / "lock").read_text())
    assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
    lock.close()


def test_a_loader_s_worker_does_not_keep_the_lock_of_its_dead_rank(tmp_path):
    lock = run_lock.claim(tmp_path / "run")
    if (child := os.fork()) == 0:
        import time

        time.sleep(60)
        os._exit(0)
    try:
        lock.close()
        path = str(tmp_path / "run" / "lock")
        code = f"import fcntl; fcntl.lockf(open({path!r}, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_a_rank_that_sees_another_folder_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(
        run_lock.collectives, "broadcast_from_main", lambda value: ("node-a", ".token-of-node-a")
    )
    with refused("run.dir", tmp_path, socket.gethostname(), "node-a"):
        run_lock.claim(tmp_path)
    monkeypatch.setattr(run_lock.collectives, "broadcast_from_main", lambda value: value)
    for token in tmp_path.glob(".token-*"):
        token.unlink()
    run_lock.claim(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_where_nothing_can_be_locked_a_warning_is_printed(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    assert run_lock.claim(tmp_path) is None
    assert "Operation not supported" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file", "file/below", "read-only", "read-only/below"])
def test_a_folder_that_cannot_be_made_or_written_is_one_line(tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    (tmp_path / "read-only").mkdir()
    if name.startswith("read-only"):  # root may write anywhere, so the mode of a folder shows nothing
        monkeypatch.setattr(run_lock.os, "access", lambda path, mode: not mode & os.W_OK)
        monkeypatch.setattr(Path, "mkdir", raises_read_only)
    for check in (run_lock.check_can_be_made, run_lock.claim):
        with refused("run.dir", tmp_path / name):
            check(tmp_path / name)
    if name == "read-only":
        monkeypatch.undo()
        (tmp_path / name / "checkpoints").mkdir()
        monkeypatch.setattr(run_lock.os, "access", lambda path, mode: not mode & os.W_OK)
        run_lock.check_can_be_made(tmp_path / name)  # its run may be finished


def raises_read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def looked_at(folder, resume, **identity):
    """What a job finds that has waited for the lock; `identity` differs from that of the job before it."""

    @dataclass(frozen=True)
    class Waiting:
        resume: str
        identity: dict
        folder: CheckpointFolder
        run_dir: Path
        world: World
        resume_from: Path | None = None

    job = Waiting(resume, {**IDENTITY, **identity}, CheckpointFolder(folder), folder, World())
    return run.with_newest_checkpoint(job).resume_from


IDENTITY = {name: 0 for name in MUST_AGREE} | {"world_size": 1, "zero_stage": 2}


def test_a_job_that_waited_does_not_start_over_the_run_of_the_job_before_it(tmp_path):
    assert looked_at(tmp_path, "never") is None  # nobody was here
    (tmp_path / "config.yaml").write_text("finished")
    (tmp_path / "student.safetensors").write_text("finished")
    with refused("run.dir", tmp_path, "--resume auto"):
        looked_at(tmp_path, "never")
    with refused("run.dir", tmp_path / "checkpoints" / "latest"):  # its checkpoints are gone
        looked_at(tmp_path, "auto")
    assert (tmp_path / "config.yaml").read_text() == "finished"


def test_a_job_that_waited_with_resume_auto_continues_what_it_finds(tmp_path):
    assert looked_at(tmp_path, "auto") is None
    folder = CheckpointFolder(tmp_path)
    folder.begin(7)
    folder.commit(7, {"step": 7, "position": 7, **IDENTITY}, {})
    assert looked_at(tmp_path, "auto") == folder.path / "step-00000007"
    with refused("seed", "run.seed"):
        looked_at(tmp_path, "auto", seed=1)
