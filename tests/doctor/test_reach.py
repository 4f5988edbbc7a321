"""Nodes are asked as pdsh would start a program there; answers are found among noise, errors explained."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dmae_ds.doctor import inspect_node, later_rounds
from dmae_ds.doctor.answer import MARK, decode_answer, encode
from dmae_ds.doctor.inspect_node import hash_code, inspect_port, read_requirements
from dmae_ds.doctor.inspect_recipe import find_holder
from dmae_ds.doctor.reach import (
    Reach,
    Trouble,
    compare_clocks,
    end_group,
    explain,
    make_ssh_command,
    start_group,
)
from tests.processes import wait_until_ended
from tests.train.conftest import free_port

PYTHON, WORK = "/venv/bin/python", "/srv/work"
CHANGED = "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed."
UNKNOWN = "No ED25519 host key is known for node1 and you have requested strict checking.\n"
RESOLVE = "ssh: Could not resolve hostname node1: Name or service not known"
CONNECT = "ssh: connect to host node1 port 22: Connection"
NO_MODULE = (
    f"{PYTHON}: Error while finding module specification (ModuleNotFoundError: No module named 'dmae_ds')"
)
LAST_WORDS = [
    (255, "root@node1: Permission denied (publickey).", "ssh", "ssh key", "ssh-copy-id node1"),
    (255, CHANGED, "ssh", "host key", "ssh-keygen -R node1"),
    (255, f"{UNKNOWN}Host key verification failed.", "ssh", "~/.ssh/known_hosts", "ssh-keyscan node1"),
    (255, RESOLVE, "ssh", "host name", "/etc/hosts"),
    (255, f"{CONNECT} refused", "ssh", "sshd", "--no_ssh"),
    (255, f"{CONNECT} timed out", "ssh", "answer", "port 22"),
    (255, "something new", "ssh", "something new", "ssh node1 hostname"),
    (127, f"bash: line 1: {PYTHON}: No such file or directory", "python", PYTHON, "node1"),
    (1, f"bash: line 1: cd: {WORK}: No such file or directory", "python", f"no folder {WORK}", "node1"),
    (1, NO_MODULE, "python", f"not installed|{PYTHON}", "install"),
    (1, "Traceback ...\nMemoryError: no", "python", "exit code 1|MemoryError: no", f"{PYTHON}|node1"),
]


@pytest.mark.parametrize("code, errors, where, what, fix", LAST_WORDS, ids=[case[3] for case in LAST_WORDS])
def test_last_words_are_explained(code, errors, where, what, fix):
    trouble = explain("node1", code, errors, python=PYTHON, cwd=Path(WORK))
    assert trouble.where == where
    assert all(word in trouble.what for word in what.split("|")), trouble
    assert all(word in trouble.fix for word in fix.split("|")), trouble


def test_ssh_gets_the_arguments_of_pdsh_and_never_asks():
    words = make_ssh_command("node1", {"PDSH_SSH_ARGS_APPEND": "-F '/my config' -p 2222"})
    assert words[:2] == ["ssh", "-oBatchMode=yes"] and words[-1] == "node1"
    assert words[3:7] == ["-F", "/my config", "-p", "2222"]


@pytest.mark.parametrize(
    "before, after",
    [
        ("", ""),
        ("Welcome to cluster\nquota: 10 GB", "bye\n"),
        ("motd without newline", "\n[INFO] done"),
        (f"{MARK}not json\n", ""),
    ],
)
def test_facts_are_found_among_noise(before, after):
    assert decode_answer(f'{before}\n{MARK}{{"a": [1]}}\n{after}') == {"a": [1]}


def test_noise_alone_is_not_an_answer():
    assert decode_answer("hello\nworld") is None


def test_no_shell_can_change_a_request():
    word = encode({"overrides": ["a='b c'; $(rm -rf x)", "é"]})
    assert word.replace("_", "").replace("-", "").rstrip("=").isalnum()


def test_an_inspection_that_hangs_is_ended_with_what_it_started(tmp_path):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/child; wait\n")
    script.chmod(0o755)

    class Hanging(Reach):
        def command(self, node, request):
            return [str(script)]

    trouble = Hanging(local=True, limit_s=1).ask("node1", {})
    assert isinstance(trouble, Trouble) and "1 s" in trouble.what and "--limit_s" in trouble.fix
    wait_until_ended(int((tmp_path / "child").read_text()))


def test_a_port_is_free_or_taken_by_a_process():
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", 0))
        number = server.getsockname()[1]
        assert inspect_port(number) == {"busy": None}
        server.listen()
        assert str(os.getpid()) in inspect_port(number)["busy"]


def test_node_0_answers_until_its_caller_is_gone(tmp_path):
    number = free_port()
    assert later_rounds.call("127.0.0.1", number, "word") == {"error": "Connection refused"}
    request = {"round": "listen", "port": number, "word": "word", "limit_s": 60}
    process = start_group(
        [sys.executable, "-m", "dmae_ds.doctor.inspect_node", encode(request)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        while decode_answer(process.stdout.readline().decode()) is None:
            pass
        assert later_rounds.call("127.0.0.1", number, "word") == {}
        assert later_rounds.call("127.0.0.1", number, "other word") == {
            "error": "another program answers there"
        }
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    finally:
        end_group(process)


def test_one_changed_byte_is_other_code(tmp_path, monkeypatch):
    package = tmp_path / "dmae_ds"
    (package / "train").mkdir(parents=True)
    (package / "train" / "loop.py").write_text("a")
    for folder in ("launch/recipes", "ds_configs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.yaml").write_text("a")
    monkeypatch.setattr(inspect_node, "PACKAGE", package)
    before = hash_code()["files"]
    (tmp_path / "launch" / "recipes" / "x.yaml").write_text("b")
    after = hash_code()["files"]
    assert set(before) == set(after) == {"dmae_ds/train/loop.py", "recipes/x.yaml", "ds_configs/x.yaml"}
    assert [name for name in before if before[name] != after[name]] == ["recipes/x.yaml"]


def test_requirements_are_those_of_setup_cfg():
    requirements = read_requirements()
    assert "deepspeed >= 0.19.8" in requirements and len(requirements) > 15


def test_leaving_removes_the_token_and_the_new_folders(tmp_path):
    run_dir = tmp_path / "runs" / "one"
    request = {"word": "w", "run_dir": str(run_dir), "made": [str(run_dir), str(run_dir.parent)]}
    later_rounds.token_folder(request).mkdir(parents=True)
    (later_rounds.token_folder(request) / "0").write_text("")
    later_rounds.leave(request)
    assert list(tmp_path.iterdir()) == []


def test_leaving_ends_what_carries_this_doctors_word_and_nothing_else():
    def rank(word: str) -> subprocess.Popen:
        arguments = ["-m", "dmae_ds.doctor.allreduce", "--word", word]
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", *arguments])

    mine, other = rank("my-word"), rank("other-word")
    try:
        assert later_rounds.end_processes("my-word") == 1
        assert mine.wait(timeout=30) != 0 and other.poll() is None
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()


def test_an_answer_is_one_line_of_json():
    request = {"round": "leave", "word": "w", "run_dir": None, "made": [], "limit_s": 60}
    done = subprocess.run(
        [sys.executable, "-m", "dmae_ds.doctor.inspect_node", encode(request)],
        capture_output=True,
        text=True,
        check=True,
    )
    marked = [line for line in done.stdout.splitlines() if line]
    assert len(marked) == 1 and json.loads(marked[0].removeprefix(MARK))["ended"] == 0


def test_a_run_that_locks_its_folder_is_found_and_left_alone(tmp_path):
    assert find_holder(tmp_path) is None
    code = (
        "import fcntl, json, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "json.dump({'pid': 7, 'host': 'node3', 'since': 'noon'}, f); f.flush();"
        "print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    assert find_holder(tmp_path) == "process 7 on node3, since noon"
    process.communicate(b"\n")
    assert find_holder(tmp_path) is None


def test_the_length_of_the_work_does_not_count_in_the_comparison_of_clocks():
    # Asked at 1000, one second each way, work of 20 s; the clock there is 100 s ahead.
    assert compare_clocks(1000.0, 1022.0, arrived=1101.0, took=20.0) == (100.0, 1.0)
