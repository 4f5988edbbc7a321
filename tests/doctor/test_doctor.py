"""`dmae-ds doctor` on this machine, started as a user does."""

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
    lines = [line for line in done.stdout.splitlines() if line[:5].strip() in ("ok", "warn", "FAIL", "skip")]
    verdicts = {line[6:17].strip(): line[:5].strip() for line in lines}
    of_machines = {"python", "versions", "code", "devices", "port", "limits"}
    of_recipe = {"recipe", "shards", "teacher", "trackers", "batch", "run folder", "disk", "start"}
    assert verdicts == dict.fromkeys(of_machines | of_recipe, "ok")
    assert "2 ranks all-reduce" in done.stdout
    command = done.stdout.splitlines()[-1]
    launcher = ["deepspeed", "-q", "--num_gpus", "2", "--master_port", port, "--module", "dmae_ds"]
    train = ["train", *tiny_recipe, f"run.dir={tmp_path / 'run'}", "--resume", "auto"]
    assert shlex.split(command) == [*launcher, *train]
    assert list(tmp_path.iterdir()) == []  # no file remains, and no empty run folder


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--hostfile none", "--hostfile|'none'"),
        ("digits_dmae --no_ssh", "--no_ssh|--node_rank"),
        ("run.dir=x", "'run.dir=x'|RECIPE"),
        ("--num_nodes 2", "--num_nodes|--no_ssh"),
        ("--no_ssh --node_rank 0", "--no_ssh|--hostfile|--num_nodes"),
        ("--no_ssh --node_rank 0 --num_nodes 2", "--no_ssh|--master_addr"),
        ("--no_ssh --node_rank 2 --num_nodes 2 --master_addr x", "--node_rank 2|0 to 1"),
        ("--master_port 0", "--master_port|1 to 65535"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, arguments, words):
    from dmae_ds.cli.main import main

    assert main(["doctor", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words.split("|")) and len(error.splitlines()) == 1
