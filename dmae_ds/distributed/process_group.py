"""The process group from its start to its end: join it, watch its ranks, leave it together or with a reason.

A run is watched by heartbeat.py. torch is imported late.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Iterator

from dmae_ds.distributed.heartbeat import CONTINUE, Heartbeat
from dmae_ds.distributed.own_gpu import check_own_gpu, choose_gpu
from dmae_ds.distributed.rendezvous import agent_serves, open_own_store
from dmae_ds.distributed.world import World, threads_per_rank
from dmae_ds.errors import RankLost, RunFailed, UserError

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 600.0  # default of dist.timeout_s
# NCCL's watchdog aborts a rank whose collective takes longer than the group's time-out, and the rank says
# nothing. The heartbeat, which can name the missing rank, must come first.
WATCHDOG_LATER_S = 120.0
_watch: Heartbeat | None = None
_timeout_s = TIMEOUT_S
_backend = "gloo"
# Set for a group of one, which libraries ask the environment about; removed when it ends.
_OF_ONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
_environment_before: dict[str, str | None] = {}


def start(world: World, *, timeout_s: float = TIMEOUT_S) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs), start the heartbeat, return this rank's device.

    timeout_s: how long a rank may be waited for; then the run ends with a line that names it (heartbeat.py)
    """
    global _watch, _timeout_s, _backend
    from torch import distributed

    device = _set_device(world)
    _timeout_s = timeout_s
    _backend = "nccl" if device.type == "cuda" else "gloo"
    life = "0"
    if not distributed.is_initialized():
        life = _join(world, device)
    if world.size > 1 and _watch is None:
        _watch = Heartbeat(
            rank=world.rank,
            size=world.size,
            local_rank=world.local_rank,
            local_size=world.local_size,
            life=life,
            timeout_s=timeout_s,
            on_gpu=device.type == "cuda",
        )
    return device


def _set_device(world: World) -> torch.device:
    """Set the number of threads, and make this rank's GPU the current device. Raises UserError."""
    import torch

    # On GPUs too: an optimizer that is offloaded to the host would take all cores in every rank.
    torch.set_num_threads(threads_per_rank(world))
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", choose_gpu(world, num_visible=torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def _join(world: World, device: torch.device) -> str:
    """Initialise the process group; returns the name of this start.

    Raises RunFailed where the ranks do not meet, UserError where two of a node use one GPU.
    """
    from torch import distributed

    life = "0"
    options: dict[str, Any] = {"backend": _backend, "timeout": timeout()}
    if device.type == "cuda":
        # NCCL connects at once, and a barrier need not guess the GPU by the rank's number.
        options["device_id"] = device
    if world.size == 1:
        # One rank meets no other: no port is opened.
        options |= {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
        _environment_before.update((name, os.environ.get(name)) for name in _OF_ONE)
        os.environ.update(_OF_ONE)
    try:
        if world.size > 1 and agent_serves():
            store, life = open_own_store(rank=world.rank, size=world.size, timeout=timeout())
            options |= {"store": store, "rank": world.rank, "world_size": world.size}
        elif world.size > 1 and device.type == "cuda":
            store, _, _ = next(distributed.rendezvous("env://", world.rank, world.size, timeout=timeout()))
            options |= {"store": store, "rank": world.rank, "world_size": world.size}
        if world.size > 1 and device.type == "cuda":
            check_own_gpu(store, world, uuid=_uuid(device))
        distributed.init_process_group(**options)
    except (RuntimeError, TimeoutError) as error:
        if not isinstance(error, TimeoutError) and not lost_a_rank(error):
            raise
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunFailed(
            f"{world.name()} did not meet all {world.size} ranks at {place} within "
            f"{timeout().total_seconds():g} s: "
            f"{reason_of(error)}"
        ) from None
    return life


def _uuid(device: torch.device) -> str:
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


@contextmanager
def joined(world: World, *, timeout_s: float) -> Iterator[torch.device]:
    """Join the process group for the block, and leave it as the block ended.

    Ranks leave together, or one alone with a reason for the others. Where a collective broke, the missing
    rank is named; RankLost is raised where it cannot be named.
    """
    device = start(world, timeout_s=timeout_s)
    try:
        yield device
    except RankLost:
        raise  # leaving a group may wait for the lost rank
    except BaseException as error:
        if getattr(error, "on_every_rank", False):
            stop()
        elif isinstance(error, RuntimeError) and not isinstance(error, RunFailed) and lost_a_rank(error):
            ask_who_is_missing(error)
            raise RankLost(
                f"another rank is gone or stuck, {world.name()} reports: {reason_of(error)}; {CONTINUE}"
            ) from None
        else:
            is_ours = isinstance(error, (UserError, RunFailed))
            text = str(error) if is_ours else f"{type(error).__name__}: {error}"
            abort(text.split("\n")[0])
        raise
    stop()


def timeout() -> timedelta:
    """The bound on every wait, in the type that process groups take: on NCCL, later than the heartbeat's."""
    return timedelta(seconds=_timeout_s + (WATCHDOG_LATER_S if _backend == "nccl" else 0.0))


def bound_every_wait() -> None:
    """Give every process group of this rank the time-out of `start`.

    Groups that DeepSpeed makes have the backend's time-out, of 10 or 30 minutes.
    """
    from torch import distributed
    from torch.distributed import distributed_c10d

    if hasattr(distributed, "set_timeout"):  # torch 2.15
        set_timeout = distributed.set_timeout
    else:
        set_timeout = distributed_c10d._set_pg_timeout
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(timeout(), group)


def report(step: int, doing: str) -> None:
    """Report what this rank does after `step` finished steps; printed if it never reports again."""
    if _watch is not None:
        _watch.report(step, doing)


def ask_who_is_missing(error: RuntimeError | None = None) -> None:
    """End this process with a line that names the missing rank; returns where none is found.

    error: of the collective that broke because of another rank
    """
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
        # The rank that serves the store must leave after the others have stopped reading.
        distributed.barrier()
    _leave()


def abort(reason: str) -> None:
    """Leave the process group alone; the other ranks end with `reason`."""
    from torch import distributed

    global _watch
    if _watch is not None:
        _watch.fail(reason)
        _watch = None
    elif distributed.is_initialized() and distributed.get_world_size() == 1:
        _leave()


def _leave() -> None:
    """Destroy the process group, and restore the environment that it was started in."""
    from torch import distributed

    distributed.destroy_process_group()
    for name, value in _environment_before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _environment_before.clear()


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or stuck.

    gloo raises a plain RuntimeError with certain words, NCCL a type of its own.
    """
    from torch import distributed

    words = ("gloo", "connection closed by peer", "connection reset by peer", "timed out")
    return isinstance(error, distributed.DistError) or any(word in str(error).lower() for word in words)


def reason_of(error: RuntimeError) -> str:
    """The first sentence of a backend's message, without the place in its source."""
    text = str(error).splitlines()[0]
    return re.sub(r"^\[[^\]]*:\d+\] ", "", text).split(". ")[0]
