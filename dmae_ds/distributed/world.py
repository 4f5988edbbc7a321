"""This process's rank and the number of ranks, read from the launcher's environment without torch.

Launchers (deepspeed, torchrun, accelerate) set RANK, WORLD_SIZE and LOCAL_RANK; srun and mpirun have
variables of their own (tasks.py). Without any of them a run is one process.
"""

from __future__ import annotations

import io
import os
import socket
import sys
from dataclasses import dataclass

from dmae_ds.distributed.tasks import find_task
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
    """Read the launcher's environment. Raises UserError where it contradicts itself or says too little.

    What srun and mpirun say is set again under torchrun's names, which DeepSpeed and accelerate read.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    _adopt_task()
    if "WORLD_SIZE" not in os.environ and "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        # accelerate 1.15 does so with --cpu and more than one process, without a message.
        raise UserError(
            "`accelerate launch --cpu` started one process although several were asked for; "
            "on CPUs start with deepspeed or torchrun"
        )
    if "WORLD_SIZE" not in os.environ:
        if "RANK" in os.environ:
            raise UserError(
                f"RANK is {os.environ['RANK']} but WORLD_SIZE is not set; start with deepspeed, torchrun or "
                "accelerate launch, or remove RANK"
            )
        return World()
    size = _number("WORLD_SIZE", at_least=1)
    if size == 1:
        return World()
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; "
            "start with deepspeed, torchrun or accelerate launch"
        )
    # torchrun sets LOCAL_WORLD_SIZE, and so does accelerate through it; DeepSpeed's launcher sets LOCAL_SIZE.
    local_name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), None)
    local_size = size if local_name is None else _number(local_name, at_least=1)
    return World(_number("RANK", below=size), size, _number("LOCAL_RANK", below=local_size), local_size)


def _adopt_task() -> None:
    """Take rank and number of ranks from srun or mpirun. Raises UserError where the ranks could not meet."""
    task = find_task()
    if task is None or task.size == 1 or {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= set(os.environ):
        return
    size = os.environ.get("WORLD_SIZE", str(task.size))
    if size == "1":
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or size != str(task.size):
        problem = f"{' and '.join(missing)} is not set" if missing else f"WORLD_SIZE is {size}"
        raise UserError(
            f"{task.launcher} started {task.size} processes, and each would be a whole run: "
            f"{problem}. Set MASTER_ADDR (the first node) and MASTER_PORT for all of them, or start with "
            "deepspeed or torchrun (Slurm: launch/slurm.sbatch); WORLD_SIZE=1 is for one process by itself"
        )
    for name, value in task.variables().items():
        os.environ.setdefault(name, value)


def _number(name: str, *, at_least: int = 0, below: int | None = None) -> int:
    text = os.environ[name]
    if not text.isdecimal() or int(text) < at_least or (below is not None and int(text) >= below):
        bound = f"at least {at_least}" if below is None else f"from {at_least} to {below - 1}"
        raise UserError(f"{name} is {text!r}, expected a whole number {bound}; it is set by the launcher")
    return int(text)


def check_device_variable() -> None:
    """Raise UserError for a DMAE_DS_DEVICE other than cpu, which keeps this program off the GPUs."""
    value = os.environ.get("DMAE_DS_DEVICE", "cpu")
    if value != "cpu":
        raise UserError(f"DMAE_DS_DEVICE is {value!r}, expected cpu; remove it to use GPUs")


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
