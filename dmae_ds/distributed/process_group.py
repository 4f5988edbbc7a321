"""Ranks and the few collectives of the trainer. Only this file, `heartbeat.py`, `rendezvous.py`, `vote.py` and `teacher/pipeline.py` communicate.

Who we are is `World` (world.py). torch is imported late.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Iterator

from dmae_ds.distributed.heartbeat import Heartbeat
from dmae_ds.distributed.rendezvous import agent_serves, own_store
from dmae_ds.distributed.world import World, threads_per_rank
from dmae_ds.errors import RankLost, RunFailed, UserError

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 600.0  # where nobody says otherwise; a run says dist.timeout_s
_watch: Heartbeat | None = None  # of the process group
_timeout_s = TIMEOUT_S


def start(world: World, *, timeout_s: float = TIMEOUT_S) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs), watch over its ranks, and return this rank's device.

    timeout_s: how long anybody waits for a rank; then the run ends with a line that names it (heartbeat.py)
    """
    global _watch, _timeout_s
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{world.name()} has no GPU of its own: {torch.cuda.device_count()} here; start at most one rank a GPU"
            )
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(threads_per_rank(world))
    _timeout_s = timeout_s
    life = "0"
    if not distributed.is_initialized():
        options: dict[str, Any] = {
            "backend": "nccl" if device.type == "cuda" else "gloo",
            "timeout": timeout(),
        }
        if world.size == 1:
            # Alone, nobody has to be found: no port is opened.
            options |= {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        try:
            if world.size > 1 and agent_serves():
                store, life = own_store(rank=world.rank, size=world.size, timeout=timeout())
                options |= {"store": store, "rank": world.rank, "world_size": world.size}
            distributed.init_process_group(**options)
        except (RuntimeError, TimeoutError) as error:
            if not isinstance(error, TimeoutError) and not lost_a_rank(error):
                raise
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise RunFailed(
                f"{world.name()} did not meet all {world.size} ranks at {place} within {timeout_s:g} s: {reason_of(error)}"
            ) from None
    if world.size > 1 and _watch is None:
        _watch = Heartbeat(
            rank=world.rank,
            size=world.size,
            local_rank=world.local_rank,
            local_size=world.local_size,
            life=life,
            timeout_s=timeout_s,
        )
    return device


@contextmanager
def joined(world: World, *, timeout_s: float) -> Iterator[torch.device]:
    """`start`, and the end that fits: together, or alone with a reason for the others, or naming who is missing.

    Raises RankLost where a collective broke because of another rank that nobody can name.
    """
    device = start(world, timeout_s=timeout_s)
    try:
        yield device
    except RankLost:
        raise  # leaving a group may wait for the lost one
    except BaseException as error:
        if getattr(error, "on_every_rank", False):
            stop()
        elif isinstance(error, RuntimeError) and not isinstance(error, RunFailed) and lost_a_rank(error):
            ask_who_is_missing(error)
            raise RankLost(
                f"another rank is gone or stuck, as {world.name()} found: {reason_of(error)}; continue with --resume auto"
            ) from None
        else:
            abort(
                (
                    str(error)
                    if isinstance(error, (UserError, RunFailed))
                    else f"{type(error).__name__}: {error}"
                ).split("\n")[0]
            )
        raise
    stop()


def timeout() -> timedelta:
    """The bound on every wait, as process groups take it."""
    return timedelta(seconds=_timeout_s)


def bound_every_wait() -> None:
    """Give every process group of this rank the time-out of `start`: those that DeepSpeed makes have the backend's, of 10 or 30 minutes."""
    from torch import distributed
    from torch.distributed import distributed_c10d

    set_timeout = (
        getattr(distributed, "set_timeout", None) or distributed_c10d._set_pg_timeout
    )  # torch 2.15; before it
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(timeout(), group)


def report(step: int, doing: str) -> None:
    """Tell the others what this rank turns to after `step` finished steps: it stands in their message if it is never heard of again."""
    if _watch is not None:
        _watch.report(step, doing)


def ask_who_is_missing(error: RuntimeError | None = None) -> None:
    """A collective broke because of another rank: end this process with a line that names it. Returns where that isn't found out."""
    if _watch is not None:
        _watch.ask("timed out" if "timed out" in str(error).lower() else "closed")


def stop() -> None:
    """Leave the process group, all ranks together. Collective."""
    from torch import distributed

    global _watch
    if not distributed.is_initialized():
        return
    if _watch is not None:
        _watch.stop()
        _watch = None
        distributed.barrier()  # whoever serves the store leaves no sooner than the others have stopped looking
    distributed.destroy_process_group()


def abort(reason: str) -> None:
    """Leave the process group alone, for a reason that the others end with."""
    from torch import distributed

    global _watch
    if _watch is not None:
        _watch.fail(reason)
        _watch = None
    elif distributed.is_initialized() and distributed.get_world_size() == 1:
        distributed.destroy_process_group()


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because somebody else is gone or stuck (gloo says so in words, NCCL by its type)."""
    from torch import distributed

    words = ("gloo", "connection closed by peer", "connection reset by peer", "timed out")
    return isinstance(error, distributed.DistError) or any(word in str(error).lower() for word in words)


def reason_of(error: RuntimeError) -> str:
    """A backend's complaint without the place in its source and its advice."""
    text = str(error).splitlines()[0]
    return re.sub(r"^\[[^\]]*:\d+\] ", "", text).split(". ")[0]
