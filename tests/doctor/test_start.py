"""The printed command is the one that is tried, and the result of a try is one line."""

from __future__ import annotations

import json
import subprocess

import pytest

from dmae_ds.doctor.answer import MARK
from dmae_ds.doctor.check import FAIL, OK
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.start import Launch, judge_start, survives_pdsh
from tests.doctor.facts import assert_check

TWO = [Node("node1", 8), Node("node2", 8)]
TRAIN = "dmae_ds train r a=1 --resume auto"
DEEPSPEED = "deepspeed -q --hostfile hosts --master_addr 10.0.0.1"
TORCHRUN = "torchrun --nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr 10.0.0.1"
COMMANDS = [
    (Launch("alone", [Node("here", 1)], 29500), "dmae-ds train r a=1 --resume auto"),
    (
        Launch("alone", [Node("here", 8)], 29501),
        f"deepspeed -q --num_gpus 8 --master_port 29501 --module {TRAIN}",
    ),
    (
        Launch("pdsh", TWO, 29500, "10.0.0.1", "hosts"),
        f"{DEEPSPEED} --master_port 29500 --module {TRAIN}",
    ),
    (
        Launch("no_ssh", TWO, 29500, "10.0.0.1", "hosts", 1),
        f"{DEEPSPEED} --no_ssh --node_rank 1 --master_port 29500 --module {TRAIN}",
    ),
    (
        Launch("torchrun", TWO, 29500, "10.0.0.1", None, 1),
        f"{TORCHRUN} --master_port 29500 -m {TRAIN}",
    ),
]


@pytest.mark.parametrize("launch, command", COMMANDS, ids=[launch.kind for launch, _ in COMMANDS])
def test_the_command_for_a_terminal(monkeypatch, launch, command):
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch.command("r", ["a=1"]) == command
    if launch.kind in ("alone", "pdsh", "no_ssh") and launch.world > 1:
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(command.split()[1:])
        assert parsed.module and parsed.user_script == "dmae_ds"
        assert parsed.user_args == ["train", "r", "a=1", "--resume", "auto"]


@pytest.mark.parametrize(
    "visible, words",
    [("", "--num_gpus 2 "), ("4,6,7", "--include localhost:4,6 "), ("GPU-a,GPU-b", "torchrun --standalone ")],
)
def test_the_command_takes_the_visible_gpus_alone(monkeypatch, visible, words):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert words in Launch("alone", [Node("here", 2)], 29500).command("r", [])


def test_private_ssh_arguments_are_part_of_the_command(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F my_config")
    command = Launch("pdsh", TWO, 29500, "10.0.0.1", "hosts").command("r", [])
    assert (
        command.startswith("PDSH_SSH_ARGS_APPEND='-F my_config' deepspeed ") and "--no_ssh_check" in command
    )


def report(**stage) -> str:
    return f"node1: {MARK}{json.dumps(stage)}\n"


STARTED = "".join(report(stage="started", rank=rank, host=f"node{rank + 1}") for rank in range(2))
JOINED = STARTED.replace("started", "joined")
PAIR = Launch("pdsh", [Node("node1", 1), Node("node2", 1)], 29500, "10.0.0.1", "hosts")


@pytest.mark.parametrize("ranks, gbit", [(2, 8), (4, 12)])
def test_bandwidth_is_what_a_link_of_the_ring_carries(ranks, gbit):
    done = report(stage="done", rank=0, host="node1", seconds=1.0, bytes=10**9, ranks=ranks, device="cuda")
    check = judge_start(STARTED + done, end="", launch=PAIR, ok=True)
    assert_check(check, OK, f"{ranks} ranks|1000 ms|{gbit} Gbit/s")


TERMINATED = "node1: terminate called without an active exception"
YOURSELF = "deepspeed -q --hostfile hosts|dmae_ds.doctor.allreduce"


@pytest.mark.parametrize(
    "output, detail, fix",
    [
        (STARTED, "2 of 2 ranks started|0 joined", "node1, node2|interface"),
        (STARTED.splitlines()[0] + "\n", "1 of 2 ranks started", YOURSELF),
        (STARTED + JOINED + TERMINATED + "\n", f"2 joined|{TERMINATED}", YOURSELF),
        ("node1: RuntimeError: Address already in use\n", "Address already in use", "--master_port"),
        ("", "0 of 2 ranks started", YOURSELF),
    ],
)
def test_a_start_that_fails_reports_how_far_it_came(output, detail, fix):
    check = judge_start(output, end="did not come back within 60 s", launch=PAIR, ok=False)
    assert_check(check, FAIL, f"within 60 s|{detail}", fix)


def test_exit_code_0_without_a_report_of_the_ranks_is_a_failure():
    assert judge_start("", end="ended with exit code 0", launch=PAIR, ok=True).verdict == FAIL


ARGUMENTS = [
    "dmae_vit_large_to_base",
    "data.train=/a/b-c_d.e",
    "optim.betas=[0.9,0.95]",
    "objective.pairs=[[6, 12], [12, 24]]",
    "data.train=t-{0..2}.tar",
    "a={b,c}",
    "a={}",
    "a=b;c",
    "a=$HOME",
    "a=$HOME b",
    "a=it's",
    "a=it's b",
    "a=(1)",
    "a=`id`",
    "a=b#c",
    "a=b # c",
    "a=x|y",
    "a=1e-3",
    "~/recipe.yaml",
    "data.train=~/shards",
    "a=b\\c",
    'a="b"',
    "@a:b%c+d,e",
    "a={b, c}",
]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_accepted_argument_arrives_unchanged(argument, tmp_path):
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    (typed,) = PDSHRunner(parse_args(["--module", "dmae_ds", argument]), "").user_arguments
    # ssh passes the words, joined by blanks, to the login shell of the node
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {typed}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert survives_pdsh(argument) <= (done.stdout == argument + "\n")


def test_most_arguments_are_accepted():
    assert [argument for argument in ARGUMENTS if survives_pdsh(argument)] == [
        *ARGUMENTS[:4],
        "a={}",
        "a=it's b",
        "a=b # c",
        "a=1e-3",
        "@a:b%c+d,e",
        "a={b, c}",
    ]
