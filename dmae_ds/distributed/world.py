"""This process's rank and the number of ranks, read from the launcher's environment without torch.

Launchers (deepspeed, torchrun, accelerate, Slurm scripts) set RANK, WORLD_SIZE and LOCAL_RANK; without them a
run is one process.
"""

from __future__ import annotations

import io
import os
import socket
import sys
from dataclasses import dataclass

from dmae_ds.errors import UserError


@dataclass(frozen=True)
class World:
    """Rank and number of ranks, over all nodes and on this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def name(self) -> str:
        """Name of this rank for messages: rank 3 (host)."""
        return f"rank {self.rank} ({socket.gethostname()})"


def world_from_env() -> World:
    """Read the launcher's environment. Raises UserError where it contradicts itself."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = {name: os.environ[name] for name in names if name in os.environ}
    if "WORLD_SIZE" not in values and "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        # accelerate 1.15 does so with --cpu and more than one process, without a message.
        raise UserError(
            "`accelerate launch --cpu` started one process although several were asked for; "
            "on CPUs start with deepspeed or torchrun"
        )
    if "WORLD_SIZE" not in values or int(values["WORLD_SIZE"]) == 1:
        return World()
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {values['WORLD_SIZE']} but {', '.join(missing)} is not set; "
            "start with deepspeed, torchrun or accelerate launch"
        )
    size = int(values["WORLD_SIZE"])
    # torchrun sets LOCAL_WORLD_SIZE, and so does accelerate through it; DeepSpeed's launcher sets LOCAL_SIZE.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size)))
    return World(int(values["RANK"]), size, int(values["LOCAL_RANK"]), local_size)


def whole_lines() -> None:
    """Make this process print whole lines.

    Launchers start ranks with `python -u`, where `print` writes a line and its end apart: two ranks' lines
    would mix.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def threads_per_rank(world: World) -> int:
    """Number of threads of a rank: OMP_NUM_THREADS where it is set, else its share of the usable cores.

    torchrun sets OMP_NUM_THREADS to 1 where it is not set, which would leave most cores idle: its 1 is
    ignored.
    """
    setting = os.environ.get("OMP_NUM_THREADS", "")
    set_by_torchrun = setting == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if setting.isdigit() and int(setting) > 0 and not set_by_torchrun:
        return int(setting)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world.local_size)
