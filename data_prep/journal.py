"""Journal of a conversion: its options and the shards that are done. It survives a kill at any moment.

Line 1 is the plan; each further line is a shard that is complete under its final name, and it is on the disk
before the next one is written. A kill can only cut the last line, which is then ignored. The process that
locks the file writes DST.
"""

import fcntl
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from dmae_ds.data.shards import JOURNAL, Shard, ShardError

LOCK_WAIT_S = 10  # the workers of a killed run, which hold the lock with it, end within moments


class Journal:
    """Journal of DST, locked; workers that are forked later hold the lock, too.

    plan: None if nothing was begun; done: entries by shard number
    """

    def __init__(self, dst: Path, *, forget: bool):
        self.path = dst / JOURNAL
        self._file = self._open_locked()
        self.plan: dict | None = None
        self.done: dict[int, dict] = {}
        if not forget:
            self._load()

    def begin(self, plan: dict) -> None:
        """Empty the journal, and write the plan."""
        self._file.seek(0)
        self._file.truncate()
        self.plan, self.done = plan, {}
        self._write(plan)

    def append(self, entry: dict) -> None:
        """Add a shard that is done: entry["number"] is its number, entry["shard"] its Shard."""
        self.done[entry["number"]] = entry
        self._write(entry | {"shard": asdict(entry["shard"])})

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock; a journal that was never begun is removed."""
        if self.plan is None:
            self.remove()
        self._file.close()

    def _write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _load(self) -> None:
        text = self._file.read()
        whole = text.rfind(b"\n") + 1
        try:
            entries = [json.loads(line) for line in text[:whole].splitlines()]
            if entries:
                self.plan = dict(entries[0])
            self.done = {entry["number"]: entry | {"shard": Shard(**entry["shard"])} for entry in entries[1:]}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ShardError(f"'{self.path}' is damaged; start again with --overwrite") from None
        self._file.seek(whole)
        self._file.truncate()

    def _open_locked(self) -> BinaryIO:
        """Open and lock the file. Raises ShardError if another process keeps the lock."""
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(self.path).st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            except FileNotFoundError:  # the run that held the lock has just finished
                pass
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.close()
                    raise ShardError(
                        f"another `dmae-shards` writes '{self.path.parent}'; wait until it ends"
                    ) from None
                time.sleep(0.05)
            except OSError:
                file.close()
                raise
            file.close()
