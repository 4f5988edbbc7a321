"""Whether the process that started this rank is alive: a killed launcher leaves ranks that train on, unseen.

DeepSpeed's `deepspeed` command starts deepspeed.launcher.launch, which starts the ranks. On one node the
command has no handler for SIGTERM, so launch and the ranks remain when it ends. Under pdsh the parent of
launch is a session of sshd. A shell above `deepspeed` is not watched: nohup and a closed terminal are no
reason to stop.
"""

from __future__ import annotations

import os

import psutil

LAUNCHER = "deepspeed.launcher.launch"
RUNNERS = ("deepspeed", "ds", "deepspeed.launcher.runner")
SSHD = ("sshd", "sshd-session")


class ParentProcess:
    """This process's parent and, where that is DeepSpeed's launcher, the process that holds it."""

    def __init__(self):
        self._parent = os.getppid()
        self._holder = None
        try:
            parent = psutil.Process(self._parent)
            if LAUNCHER in parent.cmdline():
                self._holder = next((above for above in parent.parents() if _holds(above)), None)
        except psutil.Error:
            pass

    def is_gone(self) -> bool:
        """Whether the parent has ended, or the process that holds DeepSpeed's launcher has."""
        return os.getppid() != self._parent or (self._holder is not None and not _lives(self._holder))


def _holds(process: psutil.Process) -> bool:
    """Whether this is the `deepspeed` command or a session of sshd."""
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
