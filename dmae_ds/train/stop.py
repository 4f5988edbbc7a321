"""Stopping on SIGTERM, SIGUSR1 and Ctrl-C: finish the step, save, end with exit code 75.

Clusters reclaim machines this way. Slurm sends SIGUSR1 ahead of the time limit (`--signal`) and SIGTERM at
`scancel` and preemption, Kubernetes SIGTERM before it removes a pod, a launcher SIGTERM to every rank in
turn, and often the same rank gets it twice. So a repeated signal changes nothing, except that a second
Ctrl-C (SIGINT) ends the process at once. SIGKILL does, too. Both lose what came after the last checkpoint.
"""

from __future__ import annotations

import os
import signal
import time

from dmae_ds.distributed.tasks import rank_in_env
from dmae_ds.output.lines import log

STOPS = (signal.SIGTERM, signal.SIGUSR1)
# A terminal sends one Ctrl-C to the launcher and to its ranks, and a launcher may pass it on to the ranks.
SAME_CTRL_C_S = 1.0


class StopRequest:
    """True once this process was asked to stop; its signal handlers stay until the process ends."""

    def __init__(self):
        self._requested = False
        self._interrupted_s: float | None = None  # when Ctrl-C came first
        for number in STOPS:
            signal.signal(number, self._request)
        if (
            signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
        ):  # it is ignored in the background of a script
            signal.signal(signal.SIGINT, self._interrupt)

    def __bool__(self) -> bool:
        return self._requested

    def _request(self, number: int, frame: object) -> None:
        self._requested = True

    def _interrupt(self, number: int, frame: object) -> None:
        now, first = time.monotonic(), self._interrupted_s
        if first is None:
            self._requested, self._interrupted_s = True, now
            _say("Ctrl-C: the step is finished and saved, then the run ends; a second Ctrl-C ends it at once")
        elif now - first > SAME_CTRL_C_S:
            _say("a second Ctrl-C: ended at once; --resume auto continues from the last checkpoint")
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


def _say(text: str) -> None:
    """Write a line on rank 0, without the buffers of a stream that the signal may have interrupted."""
    log(text)
    if rank_in_env() == 0:
        os.write(2, f"\ndmae-ds: {text}\n".encode())
