"""Ranks as srun and mpirun number them: they start N processes, and set neither RANK nor WORLD_SIZE.

Without a look at their own variables each of the N processes would be a whole run by itself. `deepspeed
--launcher slurm | openmpi | mpich | impi | mvapich` start processes through them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

# {launcher: variables of rank, number of ranks, rank on this node, number of ranks on this node}; where
# there are several, the first that is set counts. Open MPI stands before Slurm: under Slurm its processes
# also have the variables of the srun that started its daemons.
_LAUNCHERS = {
    "mpirun (Open MPI)": (
        ["OMPI_COMM_WORLD_RANK"],
        ["OMPI_COMM_WORLD_SIZE"],
        ["OMPI_COMM_WORLD_LOCAL_RANK"],
        ["OMPI_COMM_WORLD_LOCAL_SIZE"],
    ),
    "mpirun (MVAPICH)": (
        ["MV2_COMM_WORLD_RANK"],
        ["MV2_COMM_WORLD_SIZE"],
        ["MV2_COMM_WORLD_LOCAL_RANK"],
        ["MV2_COMM_WORLD_LOCAL_SIZE"],
    ),
    "jsrun": (
        ["JSM_NAMESPACE_RANK"],
        ["JSM_NAMESPACE_SIZE"],
        ["JSM_NAMESPACE_LOCAL_RANK"],
        ["JSM_NAMESPACE_LOCAL_SIZE"],
    ),
    "flux run": (["FLUX_TASK_RANK"], ["FLUX_JOB_SIZE"], ["FLUX_TASK_LOCAL_ID"], []),
    "mpiexec (MPICH, Intel MPI)": (
        ["PMI_RANK"],
        ["PMI_SIZE"],
        ["MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"],
        ["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
    ),
    "srun": (["SLURM_PROCID"], ["SLURM_STEP_NUM_TASKS"], ["SLURM_LOCALID"], []),
}


@dataclass(frozen=True)
class Task:
    """A process as its launcher numbers it; None where the launcher doesn't say."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None

    def variables(self) -> dict[str, str]:
        """The same as torchrun's variables."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_size,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def find_task() -> Task | None:
    """The process as srun or mpirun numbers it; None where neither started it."""
    found = [task for name in _LAUNCHERS if (task := _read(name)) is not None]
    if not found:
        return None
    first = found[0]
    same = [task for task in found if (task.rank, task.size) == (first.rank, first.size)]
    local_rank = next((task.local_rank for task in same if task.local_rank is not None), None)
    local_size = next((task.local_size for task in same if task.local_size is not None), None)
    return Task(first.launcher, first.rank, first.size, local_rank, local_size)


def rank_in_env() -> int:
    """This process's rank by RANK, or by srun or mpirun; 0 where it is alone."""
    if os.environ.get("RANK", "").isdecimal():
        return int(os.environ["RANK"])
    task = find_task()
    return 0 if task is None else task.rank


def _read(launcher: str) -> Task | None:
    rank, size, local_rank, local_size = (_number(names) for names in _LAUNCHERS[launcher])
    if launcher == "srun":
        if "SLURM_STEP_ID" not in os.environ:  # a batch script: one process, whatever the job has asked for
            return None
        size = _number(["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"])
        local_size = _slurm_local_size()
    if rank is None or size is None:
        return None
    return Task(launcher, rank, size, local_rank, local_size)


def _number(names: list[str]) -> int | None:
    texts = [os.environ[name] for name in names if os.environ.get(name, "").isdecimal()]
    return int(texts[0]) if texts else None


def _slurm_local_size() -> int | None:
    """Number of tasks on this node, from a list such as 8(x3),4."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        return None
    counts = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    node = _number(["SLURM_NODEID"]) or 0
    return counts[node] if node < len(counts) else None
