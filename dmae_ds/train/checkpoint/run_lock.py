"""One owner at a time for a run folder, which must be one folder for all ranks.

Two jobs that train into one folder, such as an orphan and its restart, would delete each other's
checkpoints. A rank whose run.dir is on a local disk of its own machine would write its part of a checkpoint
where no other rank finds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
import uuid
from pathlib import Path
from typing import IO

from dmae_ds.distributed import collectives
from dmae_ds.errors import UserError

WAIT_S = 10.0  # for the ranks of a job that is just ending
VISIBLE_S = (
    5.0  # until another machine sees a new file; NFS may cache the listing of a folder for some seconds
)
_BUSY = (errno.EAGAIN, errno.EACCES)


def claim(run_dir: Path, *, label: str = "run.dir") -> IO[str] | None:
    """Make a run folder and own it until the returned file is closed or the process ends, however it ends.

    Collective. Rank 0 holds a POSIX lock on RUN/lock, whose text names the owner; it works over NFS, and
    child processes do not inherit it. Returns None on other ranks, and where the file system has no locks.
    label: names the folder in messages
    Raises UserError, on every rank, if another process holds it or a rank sees another folder.
    """
    held = collectives.raise_on_all_ranks(
        lambda: hold(run_dir, label=label) if collectives.is_main() else None
    )
    token = collectives.raise_on_all_ranks(lambda: _write_token(run_dir) if collectives.is_main() else None)
    host, name = collectives.broadcast_from_main((socket.gethostname(), token))
    try:
        collectives.raise_on_all_ranks(lambda: _wait_for_token(run_dir / name, host, label=label))
    finally:
        if collectives.is_main():
            (run_dir / name).unlink(missing_ok=True)
    return held


def hold(run_dir: Path, *, label: str = "run.dir") -> IO[str] | None:
    """Make a run folder and hold its lock, on one rank alone.

    Raises UserError if another process has it, or nothing can be written there.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / "lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise _unusable(run_dir, label, error.strerror) from None
    end = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in _BUSY:
                print(
                    f"{label} '{run_dir}' is on a file system without locks ({error.strerror}): "
                    "a second job in this folder will not be noticed",
                    file=sys.stderr,
                    flush=True,
                )
                return None
            if time.monotonic() > end:
                file.seek(0)
                raise UserError(
                    f"{label} '{run_dir}' is in use by {_describe_owner(file.read())}; "
                    f"wait for it or stop it, or choose another {label}"
                ) from None
            time.sleep(0.2)
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, file)
    file.flush()
    return file


def check_can_be_made(run_dir: Path, *, label: str = "run.dir") -> None:
    """Raise UserError where a run folder plainly cannot be made or written; nothing is written.

    That of a run that has checkpoints may be read-only: the run may be finished.
    """
    try:
        nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if os.path.lexists(path))
        has_run = (run_dir / "checkpoints").is_dir()
        if not nearest.is_dir():
            raise _unusable(run_dir, label, f"'{nearest}' is not a folder")
        if not os.access(nearest, os.X_OK if has_run else os.W_OK | os.X_OK):
            raise _unusable(run_dir, label, f"'{nearest}' is read-only")
    except OSError as error:
        raise _unusable(run_dir, label, error.strerror) from None


def _unusable(run_dir: Path, label: str, reason: str) -> UserError:
    return UserError(f"{label} '{run_dir}' cannot be used: {reason}; choose a folder that can be written")


def _describe_owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "another job"


def _write_token(run_dir: Path) -> str:
    token = run_dir / f".token-{uuid.uuid4().hex}"
    token.touch()
    return token.name


def _wait_for_token(token: Path, host: str, *, label: str) -> None:
    end = time.monotonic() + VISIBLE_S
    while not token.exists():
        if time.monotonic() > end:
            raise UserError(
                f"{label} '{token.parent}' on {socket.gethostname()} is not the folder of {host}: "
                "it must be on a file system that all nodes share"
            )
        time.sleep(0.1)
