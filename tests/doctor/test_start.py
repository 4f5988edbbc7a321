"""The command that is printed is the one that is tried, and what came of a try is said in one line."""

from __future__ import annotations

import json
import subprocess

import pytest

from dmae_ds.doctor.answer import MARK
from dmae_ds.doctor.check import FAIL, OK
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.start import Launch, judge_start, survives_pdsh

TWO = [Node("node1", 8), Node("node2", 8)]
COMMANDS = [
    (Launch("alone", [Node("here", 1)], 29500), "dmae-ds train r a=1 --resume auto"),
    (
        Launch("alone", [Node("here", 8)], 29501),
        "deepspeed --num_gpus 8 --master_port 29501 --module dmae_ds train r a=1 --resume auto",
    ),
    (
        Launch("pdsh", TWO, 29500, "10.0.0.1", "hosts"),
        "deepspeed --hostfile hosts --master_addr 10.0.0.1 --master_port 29500 --module dmae_ds train r a=1 --resume auto",
    ),
    (
        Launch("no_ssh", TWO, 29500, "10.0.0.1", "hosts", 1),
        "deepspeed --hostfile hosts --master_addr 10.0.0.1 --no_ssh --node_rank 1 --master_port 29500 --module dmae_ds train r a=1 --resume auto",
    ),
    (
        Launch("torchrun", TWO, 29500, "10.0.0.1", None, 1),
        "torchrun --nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr 10.0.0.1 --master_port 29500 -m dmae_ds train r a=1 --resume auto",
    ),
]


@pytest.mark.parametrize("launch, command", COMMANDS, ids=[launch.kind for launch, _ in COMMANDS])
def test_the_command_that_a_person_types(monkeypatch, launch, command):
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND", raising=False)
    assert launch.command("r", ["a=1"]) == command
    if launch.kind in ("alone", "pdsh", "no_ssh") and launch.world > 1:
        from deepspeed.launcher.runner import parse_args

        parsed = parse_args(command.split()[1:])
        assert (
            parsed.module
            and parsed.user_script == "dmae_ds"
            and parsed.user_args == ["train", "r", "a=1", "--resume", "auto"]
        )


def test_private_ssh_arguments_are_part_of_the_command(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F my_config")
    command = Launch("pdsh", TWO, 29500, "10.0.0.1", "hosts").command("r", [])
    assert (
        command.startswith("PDSH_SSH_ARGS_APPEND='-F my_config' deepspeed ") and "--no_ssh_check" in command
    )


def say(**stage) -> str:
    return f"node1: {MARK}{json.dumps(stage)}\n"


STARTED = "".join(say(stage="started", rank=rank, host=f"node{rank + 1}") for rank in range(2))
JOINED = STARTED.replace("started", "joined")
PAIR = Launch("pdsh", [Node("node1", 1), Node("node2", 1)], 29500, "10.0.0.1", "hosts")


@pytest.mark.parametrize("ranks, gbit", [(2, 8), (4, 12)])
def test_bandwidth_is_what_a_link_of_the_ring_carries(ranks, gbit):
    done = say(stage="done", rank=0, host="node1", seconds=1.0, bytes=10**9, ranks=ranks, device="cuda")
    found = judge_start(STARTED + done, end="", launch=PAIR, ok=True)
    assert (
        found.verdict == OK
        and f"{ranks} ranks" in found.detail
        and f"in 1000 ms: {gbit} Gbit/s" in found.detail
    )


@pytest.mark.parametrize(
    "output, words, fix",
    [
        (STARTED, "2 of 2 ranks started, 0 joined", "cannot talk"),
        (STARTED.splitlines()[0] + "\n", "1 of 2 ranks started", "see for yourself: deepspeed"),
        (
            STARTED + JOINED + "node1: terminate called without an active exception\n",
            "2 joined; node1: terminate called",
            "see for yourself",
        ),
        ("node1: RuntimeError: Address already in use\n", "Address already in use", "--master_port"),
        ("", "0 of 2 ranks started", "see for yourself"),
    ],
)
def test_a_start_that_fails_says_how_far_it_came(output, words, fix):
    found = judge_start(output, end="did not come back within 60 s", launch=PAIR, ok=False)
    assert (
        found.verdict == FAIL and words in found.detail and fix in found.fix and "within 60 s" in found.detail
    )


def test_a_launcher_that_says_0_without_a_word_of_the_ranks_has_failed():
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
def test_an_argument_that_is_let_through_pdsh_arrives_as_it_was(argument, tmp_path):
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    (typed,) = PDSHRunner(parse_args(["--module", "dmae_ds", argument]), "").user_arguments
    # ssh gives the words, joined by blanks, to the login shell there
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {typed}"], capture_output=True, text=True, cwd=tmp_path
    )
    assert survives_pdsh(argument) <= (done.stdout == argument + "\n")


def test_most_arguments_are_let_through():
    assert [argument for argument in ARGUMENTS if survives_pdsh(argument)] == [
        *ARGUMENTS[:4],
        "a={}",
        "a=it's b",
        "a=b # c",
        "a=1e-3",
        "@a:b%c+d,e",
        "a={b, c}",
    ]
