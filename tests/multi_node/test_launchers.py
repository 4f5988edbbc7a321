"""One run on one rank, on two ranks of a node, and on two nodes, by every launcher: equal batches and losses.

The teacher is in two stages, one on each node. One case runs by default, the others are slow.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dmae_ds.distributed.world import World, world_from_env
from dmae_ds.train.finished import NOT_YET
from dmae_ds.train.finished import main as finished
from tests.multi_node.nodes import LIMIT_S, TwoNodes, ssh_available
from tests.multi_node.recorded import batches
from tests.train.conftest import free_port, losses, run

MODULE = "tests.multi_node.recorded"
PORT = "29500"  # each pair of nodes has a network of its own
STREAM = ["teacher.placement=pipeline", "teacher.stages=2"]


@pytest.fixture(scope="module")
def alone(tiny_recipe, tmp_path_factory) -> Path:
    """The run folder of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = run([sys.executable, "-m", MODULE, "train", *tiny_recipe, f"run.dir={folder / 'run'}"], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def same_run(found: Path, expected: Path) -> None:
    """Check for the same global batches, and in fp32 for the same losses to 1e-5."""
    assert len(losses(expected)) == len(batches(expected)) == 20
    assert batches(found) == batches(expected)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


def on_both(nodes: TwoNodes, commands: list[list[str]]) -> list[str]:
    """Run one command on each node at the same time, to the end; returns their output."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [node.popen(command, **options) for node, command in zip(nodes.nodes, commands, strict=True)]
    outputs = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return outputs


def without_ssh(nodes: TwoNodes, arguments: list[str]) -> list[list[str]]:
    start = ["deepspeed", "--hostfile", str(nodes.hostfile), "--no_ssh"]
    start += ["--master_addr", "node-a", "--master_port", PORT]
    return [[*start, "--node_rank", str(rank), "--module", MODULE, *arguments] for rank in range(2)]


def by_torchrun(arguments: list[str]) -> list[str]:
    start = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1"]
    start += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"node-a:{PORT}", "--rdzv_id", "one"]
    return [*start, "-m", MODULE, *arguments]


def train(recipe: list[str], run_dir: Path, zero: str) -> list[str]:
    return ["train", *recipe, *STREAM, f"deepspeed={zero}", f"run.dir={run_dir}"]


def test_deepspeed_gives_the_number_of_ranks_of_a_node(monkeypatch):
    # It sets LOCAL_SIZE, torchrun sets LOCAL_WORLD_SIZE.
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in {
        "RANK": 3,
        "WORLD_SIZE": 4,
        "LOCAL_RANK": 1,
        "LOCAL_SIZE": 2,
        "MASTER_ADDR": "node-a",
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert world_from_env() == World(rank=3, size=4, local_rank=1, local_size=2)


def test_a_finished_run_is_recognised(tiny_recipe, alone, tmp_path):
    def exit_code(*more: str) -> int:
        return finished([*tiny_recipe, "--resume", "auto", f"run.dir={alone}", *more])

    assert exit_code() == 0
    for option in ("-q", "--quiet", "--allow-pipe", "--dry-run"):
        assert exit_code(option) == 0
    assert exit_code("optim.epochs=1") == NOT_YET
    assert exit_code(f"run.dir={tmp_path}") == NOT_YET
    assert exit_code("optim.epoch=1") == NOT_YET  # a wrong key: `train` will refuse it


@pytest.mark.parametrize("zero", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_nodes_without_ssh(nodes, tiny_recipe, alone, zero):
    run_dir = nodes.folder / "run"
    output, _ = on_both(nodes, without_ssh(nodes, train(tiny_recipe, run_dir, zero)))
    assert "2 ranks x 8 images" in output
    same_run(run_dir, alone)
    assert all(not node.processes() for node in nodes.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_nodes_over_ssh(nodes, tiny_recipe, alone, zero):
    if reason := ssh_available():
        pytest.skip(f"NOT RUN OVER SSH: {reason}")
    run_dir = nodes.folder / "run"
    done = nodes.a.run(
        ["deepspeed", "--hostfile", nodes.hostfile, "--module", MODULE, *train(tiny_recipe, run_dir, zero)]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    same_run(run_dir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_nodes_by_torchrun(nodes, tiny_recipe, alone, zero):
    run_dir = nodes.folder / "run"
    on_both(nodes, [by_torchrun(train(tiny_recipe, run_dir, zero))] * 2)
    same_run(run_dir, alone)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_of_one_node(tiny_recipe, alone, tmp_path, zero):
    run_dir = tmp_path / "run"
    start = ["deepspeed", "-q", "--num_gpus", "2", "--master_port", str(free_port()), "--module", MODULE]
    done = run([*start, *train(tiny_recipe, run_dir, zero)], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    same_run(run_dir, alone)
