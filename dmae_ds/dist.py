"""Ranks and the few collectives of the trainer. Only this file and `teacher/pipeline.py` communicate.

Launchers (deepspeed, torchrun, accelerate, Slurm scripts) say who we are in RANK, WORLD_SIZE and LOCAL_RANK; without
them a run is one process. torch is imported late: `World` alone is needed to check a recipe.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Callable, TypeVar

from dmae_ds.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
TIMEOUT_S = 1800


@dataclass(frozen=True)
class World:
    """Which process this is among how many, on all nodes and on this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def name(self) -> str:
        """ "rank 3 (host)", for messages."""
        return f"rank {self.rank} ({socket.gethostname()})"


def world_from_env() -> World:
    """Read the launcher's environment. Raises UserError where it contradicts itself."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if "WORLD_SIZE" not in found and "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        # accelerate 1.15 does so with --cpu and more than one process, and says nothing.
        raise UserError("`accelerate launch --cpu` started one process though more were asked for; start with deepspeed or torchrun on CPUs")
    if "WORLD_SIZE" not in found or int(found["WORLD_SIZE"]) == 1:
        return World()
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {found['WORLD_SIZE']} but {', '.join(missing)} is not set; start with deepspeed, torchrun or accelerate launch")
    rank, size, local_rank = int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"])
    # torchrun says LOCAL_WORLD_SIZE, DeepSpeed's launcher says it too since 0.16, accelerate does through torchrun.
    return World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def start(world: World) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device."""
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(f"{world.name()} has no GPU of its own: {torch.cuda.device_count()} here; start at most one rank a GPU")
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if world.local_size > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
    if not distributed.is_initialized():
        options: dict[str, Any] = {"backend": "nccl" if device.type == "cuda" else "gloo", "timeout": timedelta(seconds=TIMEOUT_S)}
        if world.size == 1:
            # Alone, nobody has to be found: no port is opened.
            options |= {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        distributed.init_process_group(**options)
    return device


def stop() -> None:
    """Leave the process group."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def world_size() -> int:
    """Ranks in the process group."""
    from torch import distributed

    return distributed.get_world_size()


def is_main() -> bool:
    """Whether this is rank 0 of the process group."""
    from torch import distributed

    return distributed.get_rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    from torch import distributed

    distributed.barrier()


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks, the same on every rank; NaNs stay NaNs."""
    from torch import distributed

    total = values.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, on every rank."""
    from torch import distributed

    total = values.clone()
    distributed.all_reduce(total)
    return total


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """[n, ...] of every rank -> [ranks * n, ...] on every rank, in the order of ranks."""
    import torch
    from torch import distributed

    found = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, rows.contiguous())
    return torch.cat(found)


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because somebody else is gone or stuck (gloo says so in words, NCCL by its type)."""
    from torch import distributed

    words = ("gloo", "connection closed by peer", "connection reset by peer", "timed out")
    return isinstance(error, distributed.DistError) or any(word in str(error).lower() for word in words)


def reason_of(error: RuntimeError) -> str:
    """A backend's complaint without the place in its source and its advice."""
    text = str(error).splitlines()[0]
    return re.sub(r"^\[[^\]]*:\d+\] ", "", text).split(". ")[0]


def main_says(value: T) -> T:
    """Rank 0's answer, on every rank; the others' is ignored."""
    from torch import distributed

    answer = [value]
    distributed.broadcast_object_list(answer, src=0)
    return answer[0]


def together(step: Callable[[], T]) -> T:
    """Do something that may meet a user's mistake, perhaps on one rank alone; then every rank raises the same UserError.

    Collective: every rank must call it.
    """
    result, message = None, None
    try:
        result = step()
    except UserError as error:
        message = str(error)
    messages = gather_objects((socket.gethostname(), message))
    failed = [rank for rank, (_, found) in enumerate(messages) if found is not None]
    if not failed:
        return result
    host, first = messages[failed[0]]
    error = UserError(first if len(failed) == len(messages) else f"{first} (met by rank {failed[0]} on {host})")
    error.on_every_rank = True
    raise error


def gather_objects(value: Any) -> list[Any]:
    """Every rank's plain value, in the order of ranks. For rare, small things."""
    from torch import distributed

    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
