"""What a run's memory really came to, beside what the planner (dmae_ds/plan) said.

On a GPU, what torch's allocator gave out at the worst moment. On a CPU, the process's largest resident set above what was
resident before the run was wired: the interpreter and its libraries are left out, loader workers are other processes.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux's


class PeakMemory:
    """Start it once everything is imported and nothing is built; `peak` may be asked at any time after, if it `can_measure`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._before = 0
        self.can_measure = device.type == "cuda" or (_STATUS.exists() and os.access(_CLEAR, os.W_OK))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif self.can_measure:
            _CLEAR.write_text("5")  # forgets the largest resident set so far
            self._before = _status_bytes("VmRSS")

    def peak(self) -> int:
        """Bytes at the worst moment since the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _status_bytes("VmHWM") - self._before)


def _status_bytes(field: str) -> int:
    # Of this process alone: getrusage's ru_maxrss survives exec, and so may be the launcher's.
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(f"{_STATUS} has no {field}")
