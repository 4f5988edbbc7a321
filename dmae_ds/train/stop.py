"""Stopping on SIGTERM and SIGUSR1: finish the step, save, end with exit code 75.

Clusters reclaim machines this way. Slurm sends SIGUSR1 ahead of the time limit (`--signal`) and SIGTERM at
`scancel` and preemption, Kubernetes SIGTERM before it removes a pod, a launcher SIGTERM to every rank in
turn, and often the same rank gets it twice. So a repeated signal changes nothing. SIGINT (Ctrl-C) and
SIGKILL stop at once and lose what came after the last checkpoint.
"""

from __future__ import annotations

import signal

STOPS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """True once this process was asked to stop; its signal handlers stay until the process ends."""

    def __init__(self):
        self._requested = False
        for number in STOPS:
            signal.signal(number, self._request)

    def __bool__(self) -> bool:
        return self._requested

    def _request(self, number: int, frame: object) -> None:
        self._requested = True
