"""Peak memory of a run, to compare with the prediction of the planner (dmae_ds/plan).

On a GPU it is the peak of torch's allocator, on a CPU the process's largest resident set; both less what was
there before the run was built: other runs of a bench, the interpreter and its libraries are left out, and
loader workers are other processes.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux only


class PeakMemory:
    """Counts from its construction on: make it when everything is imported and nothing is built.

    `peak` may be called at any time, if `can_measure`.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._before = 0
        self.can_measure = device.type == "cuda" or (_STATUS.exists() and os.access(_CLEAR, os.W_OK))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif self.can_measure:
            _CLEAR.write_text("5")  # resets the largest resident set
            self._before = _status_bytes("VmRSS")

    def peak(self) -> int:
        """Largest number of bytes since the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return max(0, _status_bytes("VmHWM") - self._before)


def memory_now(device: torch.device) -> int:
    """Bytes that this process uses: the allocator's peak so far on a GPU, elsewhere the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _status_bytes(field: str) -> int:
    # getrusage's ru_maxrss would not do: it survives exec, so it may be the parent process's.
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise LookupError(f"{_STATUS} has no {field}")
