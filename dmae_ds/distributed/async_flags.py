"""How ranks agree on something at every step without waiting for it."""

from __future__ import annotations

import torch
from torch import distributed

from dmae_ds.distributed import collectives


class Vote:
    """What any rank wishes, known to all of them at the same step, without a wait: a sum that is read one step after it was started.

    So a device is never waited for that has nothing else to do. Alone, and before the first `cast`, the wishes are one's own, and none.
    """

    def __init__(self, num: int, device: torch.device):
        self._device, self._alone = device, collectives.world_size() == 1
        pinned = device.type == "cuda" and not self._alone
        self._own, self._sums = (torch.zeros(num, pin_memory=pinned) for _ in range(2))
        self._work, self._copied = None, None

    def cast(self, wishes: list[bool]) -> None:
        """Say what this rank wishes. Collective."""
        self._own.copy_(torch.tensor(wishes))
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
        """What was wished for in the last cast, by any rank: the same on every rank."""
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        return [value > 0 for value in self._sums.tolist()]
