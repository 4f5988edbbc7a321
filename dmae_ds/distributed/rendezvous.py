"""A store for one start of the ranks, inside the store of torchrun's agent.

torchrun's agent serves one store for all restarts of its ranks, and torch 2.15 does not separate them
(earlier versions used the number of the restart, which the agents of several nodes may count differently):
restarted ranks would find the addresses of dead ones. So the ranks of a start first agree on a name that no
earlier start had.
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
    """Whether the store at MASTER_ADDR:MASTER_PORT is served by torchrun's agent, not by rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def open_own_store(*, rank: int, size: int, timeout: timedelta) -> tuple[Store, str]:
    """Open an empty part of the agent's store, the same for all ranks of this start. Collective.

    Returns the store and its name.
    Raises torch's DistError, or TimeoutError, where the ranks do not meet.
    """
    from torch import distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    name = _offer(store, size) if rank == 0 else _accept(store, rank, timeout.total_seconds())
    return distributed.PrefixStore(f"dmae-ds/{name}", store), name


def _offer(store: Store, size: int) -> str:
    """Rank 0: offer a new name, and repeat each rank's word to it."""
    name = uuid.uuid4().hex
    store.set("dmae-ds/offer", name)
    for other in range(1, size):
        store.set(f"dmae-ds/{name}/go/{other}", store.get(f"dmae-ds/{name}/ack/{other}"))
    return name


def _accept(store: Store, rank: int, timeout_s: float) -> str:
    """Other ranks: accept an offer once rank 0 has repeated this process's word.

    Before that, the offer may be of an earlier start.
    """
    word = uuid.uuid4().hex
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        name = store.get("dmae-ds/offer").decode()
        store.set(f"dmae-ds/{name}/ack/{rank}", word)
        answer = f"dmae-ds/{name}/go/{rank}"
        if store.check([answer]) and store.get(answer).decode() == word:
            return name
        time.sleep(POLL_S)
    raise TimeoutError("rank 0 did not answer")
