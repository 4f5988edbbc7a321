"""Ranks that srun and mpirun started: understood where they can meet, else refused; never N whole runs."""

from __future__ import annotations

import os
import subprocess

import pytest

from dmae_ds.distributed.tasks import rank_in_env
from dmae_ds.distributed.world import World, world_from_env
from tests.messages import refused
from tests.train.conftest import LIMIT_S, command, environment, free_port, metrics

MEET = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}
# Variables of task 3 of 4 on two nodes, as each launcher sets them.
SRUN = {
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
JSRUN = {name.replace("OMPI_COMM_WORLD", "JSM_NAMESPACE"): value for name, value in OPEN_MPI.items()}
LAUNCHERS = {
    "srun": SRUN,
    "srun of fewer tasks than the job has": {**SRUN, "SLURM_NTASKS": "9"},
    "srun --mpi=pmi2": {**SRUN, "PMI_SIZE": "4", "PMI_RANK": "3"},
    "Open MPI": OPEN_MPI,
    # Its daemons were started by an srun with a task for each node.
    "Open MPI under Slurm": {**SRUN, **OPEN_MPI, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
    "MPICH": MPICH,
    "deepspeed --launcher mpich": {**MPICH, "WORLD_SIZE": "4", "LOCAL_SIZE": "2"},
    "MVAPICH": MVAPICH,
    "jsrun": JSRUN,
}


@pytest.fixture
def set_env(monkeypatch):
    """Replace all variables of launchers; what the code sets is removed after the test."""
    words = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_", "MPI_", "MV2_", "JSM_")
    before = dict(os.environ)

    def set_env(values: dict) -> None:
        for name in [name for name in os.environ if name.startswith(words)]:
            del os.environ[name]
        os.environ.update(values)

    yield set_env
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("values", LAUNCHERS.values(), ids=LAUNCHERS)
def test_tasks_that_can_meet_are_ranks(set_env, values):
    set_env({**values, **MEET})
    assert world_from_env() == World(rank=3, size=4, local_rank=1, local_size=2)
    # DeepSpeed and accelerate read these.
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]


@pytest.mark.parametrize("values", LAUNCHERS.values(), ids=LAUNCHERS)
def test_tasks_that_cannot_meet_are_refused_and_one_of_them_says_so(set_env, values):
    set_env(values)
    with refused("4 processes", "MASTER_ADDR", "MASTER_PORT", "slurm.sbatch", "WORLD_SIZE=1"):
        world_from_env()
    assert rank_in_env() == 3


@pytest.mark.parametrize(
    "values",
    [
        {**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**SRUN, "WORLD_SIZE": "1"},  # the way out that the message names
        {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # in a batch script, outside srun
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {},
    ],
)
def test_one_process_is_alone(set_env, values):
    set_env(values)
    assert world_from_env() == World()


def test_what_torchrun_says_counts_more_than_the_srun_around_it(set_env):
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    set_env({**SRUN, **MEET, **given})
    assert world_from_env() == World(rank=0, size=2, local_rank=0, local_size=1)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"RANK": "1"}, ["RANK is 1", "WORLD_SIZE"]),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}, ["WORLD_SIZE", "'two'"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEET}, ["RANK", "'2'", "from 0 to 1"]),
        ({**OPEN_MPI, "WORLD_SIZE": "8", **MEET}, ["4 processes", "WORLD_SIZE is 8"]),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", **MEET}, ["WORLD_SIZE is 2", "LOCAL_RANK"]),
    ],
)
def test_variables_that_contradict_each_other_are_one_line(set_env, values, words):
    set_env(values)
    with refused(*words):
        world_from_env()


@pytest.mark.slow
def test_two_tasks_of_srun_train_together(tiny_recipe, tmp_path):
    shared = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    arguments = command(["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}"], ranks=1)
    tasks = []
    for task in "01":
        env = {**environment(), **shared, "SLURM_PROCID": task, "SLURM_LOCALID": task}
        tasks.append(subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True))
    outputs = [task.communicate(timeout=LIMIT_S)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "2 ranks x 8 images" in "".join(outputs)
    assert len(metrics(tmp_path / "run")) == 20
