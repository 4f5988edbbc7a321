"""A link is cut during a run: no connection is reset, and both sides end in time and name the other one."""

from __future__ import annotations

import re
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.multi_node.nodes import LIMIT_S, TwoNodes
from tests.multi_node.test_launchers import MODULE, by_torchrun, without_ssh
from tests.train.conftest import losses

TIMEOUT_S = 8
# The verdict, and the time that launchers take to stop ranks that hang.
BOUND_S = TIMEOUT_S + 100


def start(nodes: TwoNodes, commands: list[list[str]], name: str) -> list[subprocess.Popen]:
    processes = []
    for node, command in zip(nodes.nodes, commands, strict=True):
        with open(node.folder / name, "wb") as log:
            processes.append(node.popen(command, stdout=log, stderr=log))
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["no_ssh", "torchrun"])
def test_both_sides_of_a_cut_link_end_and_name_each_other(nodes, tiny_recipe, launcher):
    steps = 60
    recipe = [
        *tiny_recipe,
        f"optim.epochs={steps * 16 / 1400}",
        "log.every_steps=1",
        "checkpoint.every_steps=5",
        f"dist.timeout_s={TIMEOUT_S}",
    ]

    def commands(run_dir):
        train = ["train", *recipe, f"run.dir={run_dir}", "--resume", "auto"]
        return without_ssh(nodes, train) if launcher == "no_ssh" else [by_torchrun(train)] * 2

    run_dir, whole = nodes.folder / "run", nodes.folder / "whole"
    assert MODULE in commands(whole)[0]
    assert [process.wait(timeout=LIMIT_S) for process in start(nodes, commands(whole), "whole.log")] == [0, 0]
    processes = start(nodes, commands(run_dir), "cut.log")
    metrics, end = run_dir / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 12:
        assert time.monotonic() < end and all(process.poll() is None for process in processes), [
            (node.folder / "cut.log").read_text() for node in nodes.nodes
        ]
        time.sleep(0.05)
    nodes.b.cut()
    since = time.monotonic()
    # torchrun's agent on the side without the store waits for it for five minutes, torch's own time-out.
    ignored = "torchrun" if launcher == "torchrun" else None
    while running := [
        line
        for node in nodes.nodes
        for line in node.processes().values()
        if ignored is None or ignored not in line
    ]:
        assert time.monotonic() - since < BOUND_S, running
        time.sleep(0.2)
    print(f"{launcher}: all ranks ended {time.monotonic() - since:.1f} s after the cut", flush=True)
    for node in nodes.nodes:
        node.kill_all()
    assert all(process.wait() != 0 for process in processes)
    logs = [(node.folder / "cut.log").read_text() for node in nodes.nodes]
    # torchrun chooses which node has rank 0.
    for text, other in zip(logs, ("node-b", "node-a"), strict=True):
        assert re.search(rf"rank \d \({other}\) has not reported .*--resume auto", text), text
    nodes.b.join()
    continued = start(nodes, commands(run_dir), "continued.log")
    assert [process.wait(timeout=LIMIT_S) for process in continued] == [0, 0]
    assert losses(run_dir) == losses(whole)
    expected, found = load_file(whole / "student.safetensors"), load_file(run_dir / "student.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
