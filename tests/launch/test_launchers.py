"""The words and variables that train.sh and slurm.sbatch give a launcher, recorded by stand-ins."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
RECORDED = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Records its words, the variables and the hostfile; the run is then finished.
LAUNCHER = f"""#!/usr/bin/env bash
{{
    echo "${{0##*/}} $*"
    for name in {" ".join(RECORDED)}; do [ -z "${{!name+set}}" ] || echo "$name=${{!name}}"; done
}} >>"$CALLS"
while [ $# -gt 0 ]; do [ "$1" != --hostfile ] || sed 's/^/file: /' "$2" >>"$CALLS"; shift; done
touch "$CALLS.finished"
"""
# 8 GPUs; `-m dmae_ds.train.finished` says whether the launcher ran.
PYTHON = """#!/usr/bin/env bash
[ "$1" != -c ] || { echo 8; exit 0; }
[ -e "$CALLS.finished" ]
"""


@pytest.fixture
def start(tmp_path):
    """Run a script with stand-ins; returns the exit code, the last error line and what was recorded."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("deepspeed", "torchrun", "srun", "scontrol", "python"):
        (programs / name).write_text(PYTHON if name == "python" else LAUNCHER)
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in RECORDED}

    def run(script: str, *words: str, **variables: str) -> tuple[int, str, list[str]]:
        calls = tmp_path / "calls"
        calls.write_text("")
        Path(f"{calls}.finished").unlink(missing_ok=True)
        environment = {**kept, "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls), **variables}
        done = subprocess.run(
            ["bash", LAUNCH / script, "digits_mae", *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, (done.stderr.splitlines() or [""])[-1], calls.read_text().splitlines()

    return run


def words_after(option: str, call: str) -> str:
    words = call.split()
    return words[words.index(option) + 1]


@pytest.mark.parametrize(
    "variables, option, value",
    [
        ({}, "--num_gpus", "8"),
        ({"GPUS": "2"}, "--num_gpus", "2"),
        ({"CUDA_VISIBLE_DEVICES": "2,3,5", "GPUS": "3"}, "--include", "localhost:2,3,5"),
        ({"CUDA_VISIBLE_DEVICES": "2,3,5", "GPUS": "2"}, "--include", "localhost:2,3"),
    ],
)
def test_one_node_takes_the_visible_gpus_alone(start, variables, option, value):
    code, error, (call, *environment) = start("train.sh", **variables)
    assert code == 0, error
    assert call.startswith("deepspeed ") and words_after(option, call) == value
    assert ("--num_gpus" in call) != ("--include" in call)  # DeepSpeed refuses both together
    assert not [line for line in environment if line.startswith("CUDA_VISIBLE_DEVICES")]


@pytest.mark.parametrize("visible", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-1b2,MIG-2c3", "", "-1"])
def test_gpus_that_have_no_numbers_are_left_to_torchrun(start, visible):
    code, error, (call, *environment) = start("train.sh", CUDA_VISIBLE_DEVICES=visible, GPUS="1")
    assert code == 0, error
    assert call.startswith("torchrun ") and words_after("--nproc_per_node", call) == "1"
    assert f"CUDA_VISIBLE_DEVICES={visible}" in environment


def test_nodes_without_a_hostfile_take_the_visible_gpus_alone(start):
    several = {"LAUNCHER": "no_ssh", "NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node1", "GPUS": "2"}
    code, error, (call, *lines) = start("train.sh", **several, CUDA_VISIBLE_DEVICES="4,6,7")
    assert code == 0, error
    assert words_after("--include", call) == "node0:4,6@node1:4,6"
    assert [line for line in lines if "file:" in line] == ["file: node0 slots=7", "file: node1 slots=7"]
    code, error, (call, *lines) = start("train.sh", **several)
    assert "--include" not in call and "file: node1 slots=2" in lines


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"CUDA_VISIBLE_DEVICES": "2,3", "GPUS": "4"}, ["CUDA_VISIBLE_DEVICES=2,3", "GPUS=4"]),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "HOSTFILE": "hostfile"}, ["CUDA_VISIBLE_DEVICES=2,3", "HOSTFILE"]),
        (
            {"CUDA_VISIBLE_DEVICES": "GPU-1", "LAUNCHER": "no_ssh", "NODE_RANK": "0", "MASTER_ADDR": "a"},
            ["CUDA_VISIBLE_DEVICES=GPU-1", "LAUNCHER=torchrun"],
        ),
    ],
)
def test_gpus_that_a_launcher_would_ignore_are_refused(start, variables, words):
    code, error, calls = start("train.sh", **variables)
    assert code == 2 and not calls and all(word in error for word in words)


NO_SSH = {"LAUNCHER": "no_ssh", "NODE_RANK": "0", "MASTER_ADDR": "a"}
TORCHRUN = {"LAUNCHER": "torchrun", "NODES": "2", "MASTER_ADDR": "a"}


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"HOSTFILE": "nodes", "GPUS": "1"}, "GPUS=1 pdsh"),
        ({"HOSTFILE": "nodes", "LAUNCHER": "one_node"}, "HOSTFILE=nodes one_node"),
        ({"GPUS": "1", "NODES": "2"}, "NODES=2 one_node"),
        ({"MASTER_ADDR": "a"}, "MASTER_ADDR=a one_node"),
        ({**NO_SSH, "HOSTFILE": "nodes", "NODES": "2"}, "NODES=2 no_ssh HOSTFILE"),
        ({**TORCHRUN, "HOSTFILE": "nodes"}, "HOSTFILE=nodes torchrun"),
        ({**TORCHRUN, "NODE_RANK": "1"}, "NODE_RANK=1 torchrun"),
        ({"HOSTFILE": "gone"}, "HOSTFILE 'gone' hostfile.example"),
        ({**NO_SSH, "HOSTFILE": "bin"}, "HOSTFILE 'bin'"),
        ({**NO_SSH, "GPUS": "1", "NODES": "two"}, "NODES 'two'"),
        ({**NO_SSH, "GPUS": "1", "NODES": "1:2"}, "NODES '1:2'"),
        ({**NO_SSH, "GPUS": "1", "NODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 NODES=2"),
        ({**TORCHRUN, "NODES": "1:b"}, "NODES 'b'"),
        ({"RESTARTS": "abc"}, "RESTARTS 'abc'"),
        ({"RESTARTS": "-1"}, "RESTARTS '-1'"),
        ({"GPUS": "0"}, "GPUS '0'"),
        ({"PORT": "x"}, "PORT 'x'"),
    ],
)
def test_variables_that_are_wrong_or_not_read_are_refused(start, tmp_path, variables, words):
    (tmp_path / "nodes").write_text("node1 slots=1\n")
    code, error, calls = start("train.sh", **variables)
    assert code == 2 and not calls and all(word in error for word in words.split()), error


@pytest.mark.parametrize(
    "variables", [{"NODES": "1"}, {**TORCHRUN, "NODES": "1:2"}, {**NO_SSH, "HOSTFILE": "nodes"}]
)
def test_variables_that_are_read_start_a_run(start, tmp_path, variables):
    (tmp_path / "nodes").write_text("node1 slots=1\n")
    code, error, calls = start("train.sh", "--quiet", "--resume", "auto", **variables)
    assert code == 0 and " --quiet" in calls[0], error


@pytest.mark.parametrize(
    "words", ["--dry-run", "a.b=c --help", "--resume never", "--resume=never", "--resume"]
)
def test_options_that_start_no_run_or_begin_it_again_are_refused(start, words):
    code, error, calls = start("train.sh", *words.split())
    assert code == 2 and not calls and all(word in error for word in words.split()[-2:] if "=" not in word), (
        error
    )


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ["PYTORCH_CUDA_ALLOC_CONF=backend:native"]),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, []),
    ],
)
def test_memory_comes_in_segments_that_grow_unless_someone_chose(start, variables, expected):
    _, _, lines = start("train.sh", **variables)
    assert [line for line in lines if "ALLOC_CONF" in line] == expected


@pytest.mark.parametrize(
    "chosen, expected",
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_spin_for_a_moment_unless_someone_chose(start, chosen, expected):
    _, _, lines = start("train.sh", **chosen)
    found = [line.partition("=")[2] for line in lines if line.startswith("GOMP_SPINCOUNT")]
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize("cores", ["64", None])
def test_slurm_passes_the_cores_of_a_task_on(start, cores):
    variables = {} if cores is None else {"SLURM_CPUS_PER_TASK": cores}
    job = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "17"}
    code, error, calls = start("slurm.sbatch", **job, **variables)
    assert code == 0, error
    (srun,) = (call for call in calls if call.startswith("srun "))
    assert (f"--cpus-per-task={cores}" in srun) == (cores is not None)
    assert srun.endswith("digits_mae")
