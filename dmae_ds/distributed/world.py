"""Which of the ranks we are, as the launcher says. Needs no torch: it is enough to check a recipe.

Launchers (deepspeed, torchrun, accelerate, Slurm scripts) say it in RANK, WORLD_SIZE and LOCAL_RANK; without them a run is one process.
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
        raise UserError(
            "`accelerate launch --cpu` started one process though more were asked for; start with deepspeed or torchrun on CPUs"
        )
    if "WORLD_SIZE" not in found or int(found["WORLD_SIZE"]) == 1:
        return World()
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {found['WORLD_SIZE']} but {', '.join(missing)} is not set; start with deepspeed, torchrun or accelerate launch"
        )
    rank, size, local_rank = int(found["RANK"]), int(found["WORLD_SIZE"]), int(found["LOCAL_RANK"])
    # torchrun says LOCAL_WORLD_SIZE, and so does accelerate through it; DeepSpeed's launcher says LOCAL_SIZE.
    return World(
        rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size)))
    )


def whole_lines() -> None:
    """Have this process print line by line. Launchers start ranks with `python -u`, where `print` writes a line and its end apart: two ranks' lines run into one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def threads_per_rank(world: World) -> int:
    """A rank's share of the cores that this process may use, or OMP_NUM_THREADS, where somebody has set it.

    torchrun sets it to 1 for everybody who hasn't, which would leave most cores idle: its 1 counts as nobody's.
    """
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0 and not (said == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        return int(said)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world.local_size)
