"""The doctor on two nodes that are namespaces: green, with a command that works; and for each thing that is broken, red in the right line alone."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import dmae_ds
from tests.multi_node.nodes import TwoNodes, available, ssh_available

NEEDS_NODES = pytest.mark.skipif(available() is not None, reason=f"NO TWO NODES: {available()}")
NEEDS_SSH = pytest.mark.skipif(
    ssh_available() is not None, reason=f"NO TWO NODES WITH SSH: {ssh_available()}"
)
SHORT = ["optim.epochs=0.05", "optim.warmup_epochs=0.01"]
VERDICTS = ("ok", "warn", "FAIL", "skip")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    # A disk of 1 MiB, the same for both nodes: it must be there before they are.
    (folder / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder / "small"], check=True)
    try:
        with TwoNodes(folder) as both:
            yield both
    finally:
        subprocess.run(["umount", folder / "small"], check=True)


@contextmanager
def laid_over(node, above: Path, below: Path):
    """Another file or folder in place of one, in one node alone."""
    node.run(["mount", "--bind", above, below], check=True)
    try:
        yield
    finally:
        node.run(["umount", below], check=True)


def doctor(nodes, recipe: list[str], *more: str) -> subprocess.CompletedProcess:
    folder = nodes.folder / "run"
    done = nodes.a.run(
        [
            sys.executable,
            "-m",
            "dmae_ds",
            "doctor",
            *recipe,
            *SHORT,
            f"run.dir={folder}",
            "--hostfile",
            nodes.hostfile,
            *more,
        ]
    )
    assert not folder.exists() and not list(nodes.folder.glob("**/.doctor-*"))
    assert all(node.processes() == {} for node in nodes.nodes)
    return done


def verdicts(done: subprocess.CompletedProcess) -> dict[str, tuple[str, str]]:
    """check -> (verdict, what was found with the mend)"""
    found, last = {}, None
    for line in done.stdout.splitlines():
        if line[:5].strip() in VERDICTS:
            last = line[6:17].strip()
            found[last] = line[:5].strip(), line[18:]
        elif line.startswith("      ") and "->" in line:
            found[last] = found[last][0], found[last][1] + " -> " + line.partition("-> ")[2]
    return found


def assert_red(done: subprocess.CompletedProcess, check: str, *words: str) -> None:
    """One check is red, says these words (the mend's among them), and all others are green or say why they could not be made."""
    found = verdicts(done)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [name for name, (verdict, _) in found.items() if verdict not in ("ok", "skip")] == [check], (
        done.stdout
    )
    assert all(word in found[check][1] for word in words), found[check]
    assert "1 of " in done.stdout.splitlines()[-1] and "deepspeed --hostfile" not in done.stdout


@NEEDS_SSH
def test_without_a_key_the_line_is_ssh_s(nodes, tiny_recipe):
    away = nodes.key.rename(nodes.key.with_name("away"))
    try:
        done = doctor(nodes, tiny_recipe)
    finally:
        away.rename(nodes.key)
    assert_red(
        done,
        "ssh",
        "node-a, node-b: it does not accept your ssh key",
        "-> ssh-copy-id node-a",
        "the same for node-b",
    )


@pytest.mark.slow
@NEEDS_SSH
def test_green_and_the_printed_command_trains(nodes, tiny_recipe):
    done = doctor(nodes, tiny_recipe)
    found = verdicts(done)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert {
        "ssh",
        "pdsh",
        "python",
        "versions",
        "code",
        "devices",
        "port",
        "master",
        "interface",
        "recipe",
        "shards",
        "teacher",
        "batch",
        "run folder",
        "disk",
        "limits",
        "clocks",
        "start",
    } == set(found)
    assert "2 ranks all-reduce" in found["start"][1]
    command = done.stdout.splitlines()[-1]
    trained = nodes.a.run(shlex.split(command))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert (nodes.folder / "run" / "student.safetensors").is_file()
    shutil.rmtree(nodes.folder / "run")


@pytest.mark.slow
@NEEDS_SSH
def test_another_torch_on_one_node(nodes, tiny_recipe):
    version = Path(torch.__file__).with_name("version.py")
    other = nodes.folder / "version.py"
    other.write_text(version.read_text().replace(torch.__version__, "2.5.1+cu121"))
    with laid_over(nodes.b, other, version):
        done = doctor(nodes, tiny_recipe)
    # older than setup.cfg allows, too
    assert_red(
        done,
        "versions",
        f"torch {torch.__version__} on node-a; 2.5.1+cu121 on node-b",
        "node-b: torch 2.5.1+cu121, >=2.6 is needed",
        f"-> install torch=={torch.__version__} on node-b",
    )
    assert verdicts(done)["start"][1] == "it cannot work: see versions"


@pytest.mark.slow
@NEEDS_SSH
def test_a_shard_that_one_node_has_not(nodes, tiny_recipe):
    shards = Path(next(word for word in tiny_recipe if word.startswith("data.train=")).partition("=")[2])
    partial = nodes.folder / "partial"
    shutil.copytree(shards, partial)
    sorted(partial.glob("*.tar"))[1].unlink()
    with laid_over(nodes.b, partial, shards):
        done = doctor(nodes, tiny_recipe, "--no-start")
    assert_red(
        done, "shards", f"node-b: data.train '{shards}': shard-000001.tar is missing", "-> copy it again"
    )


@pytest.mark.slow
@NEEDS_SSH
def test_a_port_that_is_taken(nodes, tiny_recipe):
    code = "import socket; s = socket.create_server(('', 29500)); print('ready', flush=True); input()"
    busy = nodes.a.popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert busy.stdout.readline() == "ready\n"
    command = [
        sys.executable,
        "-m",
        "dmae_ds",
        "doctor",
        *tiny_recipe,
        f"run.dir={nodes.folder / 'run'}",
        "--hostfile",
        nodes.hostfile,
    ]
    done, other = nodes.a.run(command), None
    if done.returncode == 1:
        other = nodes.a.run([*command, "--no-start", "--master_port", "29501"])
    busy.kill()
    busy.wait()
    assert_red(
        done,
        "port",
        "29500 is taken on node-a (process ",
        "socket.create_server",
        "-> choose another: --master_port 29501",
    )
    assert other.returncode == 0, other.stdout  # the mend mends


@pytest.mark.slow
@NEEDS_SSH
def test_a_disk_that_is_full(nodes, tiny_recipe):
    small = f"run.dir={nodes.folder / 'small' / 'run'}"
    assert_red(
        doctor(nodes, tiny_recipe, small, "--no-start"),
        "disk",
        "1.0 MiB free",
        "3 + 1 checkpoints of",
        "-> free some, choose another run.dir, or lower checkpoint.keep",
    )
    with open(nodes.folder / "small" / "filler", "wb") as file, pytest.raises(OSError):
        while True:
            file.write(bytes(2**16))
            file.flush()
    full = doctor(nodes, tiny_recipe, small, "--no-start")
    assert_red(full, "disk", "0.0 MiB free", "-> free some")
    assert verdicts(full)["run folder"] == ("skip", "nothing can be written: see disk")


@pytest.mark.slow
@NEEDS_SSH
def test_other_code_on_one_node(nodes, tiny_recipe):
    loop = Path(dmae_ds.__file__).parent / "train" / "loop.py"
    other = nodes.folder / "loop.py"
    other.write_text(loop.read_text() + "\n# a line more\n")
    with laid_over(nodes.b, other, loop):
        done = doctor(nodes, tiny_recipe, "--no-start")
    assert_red(
        done,
        "code",
        "node-b has other code than node-a: dmae_ds/train/loop.py",
        "-> install the same commit on node-b",
    )


@pytest.mark.slow
@NEEDS_SSH
def test_an_interface_that_is_not_there_and_a_run_folder_that_is_not_shared(nodes, tiny_recipe):
    exports, run_dir = nodes.folder / ".deepspeed_env", nodes.folder / "kept"
    before = exports.read_text()
    run_dir.mkdir()
    nodes.b.mount_tmpfs(run_dir, size="64m")
    exports.write_text(before.replace("=eth0", "=ens5"))
    try:
        found = verdicts(doctor(nodes, tiny_recipe, f"run.dir={run_dir}"))
    finally:
        exports.write_text(before)
        nodes.b.run(["umount", run_dir], check=True)
    assert {name for name, (verdict, _) in found.items() if verdict == "FAIL"} == {"interface", "run folder"}
    assert (
        "GLOO_SOCKET_IFNAME=ens5, but there are" in found["interface"][1]
        and "echo GLOO_SOCKET_IFNAME=eth0 >> .deepspeed_env" in found["interface"][1]
    )
    assert f"{run_dir} is not the same folder on node-a, node-b" in found["run folder"][1]
    assert list(run_dir.iterdir()) == []


@pytest.mark.slow
@NEEDS_SSH
def test_ranks_that_hang_are_ended_and_named(nodes, tiny_recipe):
    ours = Path(dmae_ds.__file__).parent / "doctor" / "allreduce.py"
    hanging = nodes.folder / "allreduce.py"
    hanging.write_text("import time\ntime.sleep(1000)\n")
    with laid_over(nodes.b, hanging, ours):
        found = verdicts(doctor(nodes, tiny_recipe, "--limit_s", "40"))
    assert {name for name, (verdict, _) in found.items() if verdict == "FAIL"} == {"code", "start"}
    assert "it did not come back within 40 s; 1 of 2 ranks started, 0 joined" in found["start"][1]


@pytest.mark.slow
@NEEDS_NODES
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_without_ssh_the_nodes_meet_and_the_first_one_prints(nodes, tiny_recipe, launcher):
    which = ["--hostfile", nodes.hostfile] if launcher == "deepspeed" else ["--num_nodes", "2"]
    command = [
        sys.executable,
        "-m",
        "dmae_ds",
        "doctor",
        *tiny_recipe,
        f"run.dir={nodes.folder / 'run'}",
        "--no_ssh",
        "--master_addr",
        nodes.a.address,
        *which,
    ]
    started = [
        node.popen(
            [*command, "--node_rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank, node in enumerate(nodes.nodes)
    ]
    first, second = (process.communicate(timeout=600)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], first + second
    assert (
        "2 ranks all-reduce" in first
        and first.splitlines()[-1].startswith(f"{launcher} ")
        and "--node_rank 0" in first.splitlines()[-1]
    )
    assert second == "nothing failed; node 0 prints the checks and the command\n"
    assert not (nodes.folder / "run").exists() and all(node.processes() == {} for node in nodes.nodes)


@NEEDS_NODES
def test_a_node_that_does_not_come_is_named(nodes):
    command = [
        sys.executable,
        "-m",
        "dmae_ds",
        "doctor",
        "--no_ssh",
        "--master_addr",
        nodes.a.address,
        "--num_nodes",
        "2",
        "--limit_s",
        "2",
    ]
    started = nodes.b.popen([*command, "--node_rank", "1"], stderr=subprocess.PIPE, text=True)
    _, said = started.communicate(timeout=300)
    assert (
        started.returncode == 1
        and f"{nodes.a.address}:29500: node 0 does not answer within 2 s" in said
        and len(said.splitlines()) == 1
    )
