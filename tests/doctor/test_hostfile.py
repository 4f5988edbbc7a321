"""A hostfile and the exported variables are read as DeepSpeed's own launcher reads them."""

from __future__ import annotations

import pytest

from dmae_ds.doctor.hostfile import Node, read_exports, read_hostfile
from tests.messages import refused

HOSTFILES = [
    "a slots=1\n",
    "# all\n\n  b-1.example slots=8  \nc slots=2 # half\n",
    "10.0.0.1 slots=16\n10.0.0.2\tslots=16",
]


@pytest.mark.parametrize("text", HOSTFILES)
def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path, text):
    from deepspeed.launcher.runner import fetch_hostfile

    (tmp_path / "hostfile").write_text(text)
    theirs = fetch_hostfile(str(tmp_path / "hostfile"))
    assert read_hostfile(tmp_path / "hostfile") == [Node(name, slots) for name, slots in theirs.items()]


@pytest.mark.parametrize(
    "text, words",
    [
        ("a slots=1\nb 2\n", ["line 2", "'b 2'", "NAME slots=RANKS"]),
        ("a slots=0", ["line 1", "'a slots=0'"]),
        ("a slots=1\n#\na slots=2", ["line 3", "node a"]),
        ("# none\n", ["NAME slots=RANKS"]),
        ("a slots=x", ["line 1", "'a slots=x'"]),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, text, words):
    (tmp_path / "hostfile").write_text(text)
    with refused(tmp_path / "hostfile", *words):
        read_hostfile(tmp_path / "hostfile")


def test_a_missing_hostfile_is_one_line(tmp_path):
    with refused("--hostfile", tmp_path / "none", "No such file", "NAME slots=RANKS"):
        read_hostfile(tmp_path / "none")


def test_exported_variables_are_those_of_the_launcher(tmp_path):
    home, cwd = tmp_path / "home", tmp_path / "work"
    home.mkdir(), cwd.mkdir()
    (home / ".deepspeed_env").write_text("A=1\nB=x=y\n")
    (cwd / ".deepspeed_env").write_text("A=2\n")
    exported = read_exports(
        {"PYTHONPATH": "/p", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "UCX_TLS": "tcp"},
        cwd=cwd,
        home=home,
    )
    # gloo's interface is not exported by itself, which is why .deepspeed_env is needed at all
    assert exported == {
        "PYTHONPATH": f"{cwd}:/p",
        "NCCL_DEBUG": "INFO",
        "UCX_TLS": "tcp",
        "A": "2",
        "B": "x=y",
    }


@pytest.mark.parametrize("line", ["", "GLOO_SOCKET_IFNAME"])
def test_a_line_that_breaks_the_launcher_is_named(tmp_path, line):
    (tmp_path / ".deepspeed_env").write_text(f"A=1\n{line}\nB=2\n")
    with refused(".deepspeed_env, line 2", f"'{line}'", "NAME=VALUE"):
        read_exports({}, cwd=tmp_path, home=tmp_path)
