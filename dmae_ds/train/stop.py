"""SIGTERM and SIGUSR1 mean: finish the step, save, end with exit code 75. That is how clusters take a machine back.

Slurm sends SIGUSR1 ahead of the time limit (`--signal`) and SIGTERM at `scancel` and preemption, Kubernetes SIGTERM before
it removes a pod, a launcher SIGTERM to every rank in turn, and often the same rank gets it twice. So a repeated one
changes nothing; who can't wait has SIGINT (Ctrl-C) and SIGKILL, and loses what came after the last checkpoint.
"""

from __future__ import annotations

import signal

STOPS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """True once this process was told to stop. Stays so, and stays in force, until the process ends: launchers repeat themselves."""

    def __init__(self):
        self._told = False
        for number in STOPS:
            signal.signal(number, self._tell)

    def __bool__(self) -> bool:
        return self._told

    def _tell(self, number: int, frame: object) -> None:
        self._told = True
