"""A store that belongs to one start of the ranks alone.

torchrun's agent serves one store for all restarts of its ranks, and torch 2.15 puts nothing between them (before, the
number of the restart, which the agents of several nodes may count differently): ranks that are started again would find
the addresses of the dead. So the ranks of a start first agree on a name that no start before had.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.2


def agent_serves() -> bool:
    """Whether the store at MASTER_ADDR:MASTER_PORT is torchrun's agent's, and not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def own_store(*, rank: int, size: int, timeout: timedelta) -> tuple[Store, str]:
    """(a part of the agent's store that is empty, its name), the same for all ranks of this start. Collective.

    Raises torch's DistError, or TimeoutError, where the ranks don't come together.
    """
    from torch import distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    name = _offer(store, size) if rank == 0 else _accept(store, rank, timeout.total_seconds())
    return distributed.PrefixStore(f"dmae-ds/{name}", store), name


def _offer(store: Store, size: int) -> str:
    name = uuid.uuid4().hex
    store.set("dmae-ds/offer", name)
    for other in range(1, size):
        store.set(f"dmae-ds/{name}/go/{other}", store.get(f"dmae-ds/{name}/ack/{other}"))
    return name


def _accept(store: Store, rank: int, timeout_s: float) -> str:
    """The offer may be an earlier start's: it counts once rank 0 answers with this process's own word."""
    word, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    while time.monotonic() < end:
        name = store.get("dmae-ds/offer").decode()
        store.set(f"dmae-ds/{name}/ack/{rank}", word)
        answer = f"dmae-ds/{name}/go/{rank}"
        if store.check([answer]) and store.get(answer).decode() == word:
            return name
        time.sleep(POLL_S)
    raise TimeoutError("rank 0 did not answer")
