"""`dmae-ds doctor` on this machine, as a user starts it."""

from __future__ import annotations

import shlex
import sys

import pytest

from tests.train.conftest import free_port, run


def doctor(*arguments: str, cwd):
    return run([sys.executable, "-m", "dmae_ds", "doctor", *arguments], cwd=cwd)


def test_two_ranks_on_this_machine_pass_and_the_command_is_printed(tiny_recipe, tmp_path):
    port = str(free_port())
    done = doctor(
        *tiny_recipe, f"run.dir={tmp_path / 'run'}", "--num_gpus", "2", "--master_port", port, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = {
        line[6:17].strip(): line[:5].strip()
        for line in done.stdout.splitlines()
        if line[:5].strip() in ("ok", "warn", "FAIL", "skip")
    }
    assert set(verdicts.values()) == {"ok"}
    assert {
        "python",
        "versions",
        "code",
        "devices",
        "port",
        "recipe",
        "shards",
        "teacher",
        "batch",
        "run folder",
        "disk",
        "limits",
        "start",
    } == set(verdicts)
    assert "2 ranks all-reduce" in done.stdout
    command = done.stdout.splitlines()[-1]
    assert shlex.split(command) == [
        "deepspeed",
        "--num_gpus",
        "2",
        "--master_port",
        port,
        "--module",
        "dmae_ds",
        "train",
        *tiny_recipe,
        f"run.dir={tmp_path / 'run'}",
        "--resume",
        "auto",
    ]
    assert list(tmp_path.iterdir()) == []  # nothing stays, no empty run folder either


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--hostfile", "none"], "--hostfile 'none' cannot be read"),
        (["digits_dmae", "--no_ssh"], "--no_ssh and --node_rank go together"),
        (["run.dir=x"], "'run.dir=x' is not a recipe"),
        (["--num_nodes", "2"], "--num_nodes requires --no_ssh"),
        (["--no_ssh", "--node_rank", "0"], "--hostfile, or --num_nodes"),
        (["--no_ssh", "--node_rank", "0", "--num_nodes", "2"], "needs --master_addr"),
        (["--no_ssh", "--node_rank", "2", "--num_nodes", "2", "--master_addr", "x"], "give 0 to 1"),
        (["--master_port", "0"], "1 to 65535"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_2(capsys, arguments, words):
    from dmae_ds.cli.main import main

    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
