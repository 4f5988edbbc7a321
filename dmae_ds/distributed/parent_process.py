"""Whether what started this rank is still there: a launcher that was killed leaves ranks that train on, unseen.

DeepSpeed's `deepspeed` command starts deepspeed.launcher.launch, which starts the ranks; on one node it has no handler for
SIGTERM, so the launcher below it and the ranks stay when it goes. Under pdsh the one above is a session of sshd. A shell
above `deepspeed` is nobody's concern: nohup and a closed terminal are no reason to stop.
"""

from __future__ import annotations

import os

import psutil

LAUNCHER, RUNNERS = "deepspeed.launcher.launch", ("deepspeed", "ds", "deepspeed.launcher.runner")
SSHD = ("sshd", "sshd-session")


class ParentProcess:
    """This process's parent and, where that is DeepSpeed's launcher, who holds it: remembered now, asked for later."""

    def __init__(self):
        self._parent, self._holder = os.getppid(), None
        try:
            parent = psutil.Process(self._parent)
            if LAUNCHER in parent.cmdline():
                self._holder = next((above for above in parent.parents() if _holds(above)), None)
        except psutil.Error:
            pass

    def is_gone(self) -> bool:
        """Whether the parent ended, or the holder of the launcher did."""
        return os.getppid() != self._parent or (self._holder is not None and not _lives(self._holder))


def _holds(process: psutil.Process) -> bool:
    try:
        names = {os.path.basename(word) for word in process.cmdline()[:4]}
        return bool(names & set(RUNNERS)) or process.name() in SSHD
    except psutil.Error:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
