"""Asynchronous all-reduce of flags: ranks agree on something at every step without waiting for it."""

from __future__ import annotations

import torch
from torch import distributed

from dmae_ds.distributed import collectives


class AsyncFlags:
    """Flags that any rank may raise and that every rank sees at the same step, one step later.

    `reduce` starts the sum over ranks, `result` reads it a step later, so the host never waits for a busy
    device. With one rank, `result` gives that rank's own flags; before the first `reduce`, none is raised.
    """

    def __init__(self, num: int, device: torch.device):
        self._device = device
        self._alone = collectives.world_size() == 1
        pinned = device.type == "cuda" and not self._alone
        self._own = torch.zeros(num, pin_memory=pinned)
        self._sums = torch.zeros(num, pin_memory=pinned)
        self._work = None
        self._copied = None

    def reduce(self, flags: list[bool]) -> None:
        """Start the all-reduce of this rank's flags. Collective."""
        self._own.copy_(torch.tensor(flags))
        if self._alone:
            self._sums = self._own
            return
        if self._device.type == "cuda":
            values = self._own.to(self._device, non_blocking=True)
            distributed.all_reduce(values, async_op=True).wait()  # the device waits, not the host
            self._sums.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._sums = self._own.clone()
            self._work = distributed.all_reduce(self._sums, async_op=True)

    def result(self) -> list[bool]:
        """Whether any rank raised each flag in the last `reduce`: the same answer on every rank."""
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        return [value > 0 for value in self._sums.tolist()]
