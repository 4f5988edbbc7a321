"""The doctor on two nodes (namespaces): a command that works, and one failed check for each broken thing."""

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
DOCTOR = [sys.executable, "-m", "dmae_ds", "doctor"]
VERDICTS = ("ok", "warn", "FAIL", "skip")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes")
    # A disk of 1 MiB, the same for both nodes, mounted before they start.
    (folder / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder / "small"], check=True)
    try:
        with TwoNodes(folder) as both:
            yield both
    finally:
        subprocess.run(["umount", folder / "small"], check=True)


@contextmanager
def laid_over(node, above: Path, below: Path):
    """Mount another file or folder over one, in one node alone."""
    node.run(["mount", "--bind", above, below], check=True)
    try:
        yield
    finally:
        node.run(["umount", below], check=True)


def doctor(nodes, recipe: list[str], *more: str) -> subprocess.CompletedProcess:
    folder = nodes.folder / "run"
    command = [*DOCTOR, *recipe, *SHORT, f"run.dir={folder}", "--hostfile", nodes.hostfile, *more]
    done = nodes.a.run(command)
    assert not folder.exists() and not list(nodes.folder.glob("**/.doctor-*"))
    assert all(node.processes() == {} for node in nodes.nodes)
    return done


def verdicts(done: subprocess.CompletedProcess) -> dict[str, tuple[str, str]]:
    """(verdict, detail and fix) of each check."""
    checks, last = {}, None
    for line in done.stdout.splitlines():
        if line[:5].strip() in VERDICTS:
            last = line[6:17].strip()
            checks[last] = line[:5].strip(), line[18:]
        elif line.startswith("      ") and "->" in line:
            verdict, detail = checks[last]
            checks[last] = verdict, f"{detail} -> {line.partition('-> ')[2]}"
    return checks


def failed_checks(checks: dict[str, tuple[str, str]]) -> set[str]:
    return {name for name, (verdict, _) in checks.items() if verdict == "FAIL"}


def assert_failed(done: subprocess.CompletedProcess, check: str, *words: str) -> None:
    """Only this check failed, its detail and fix carry these words; the others are ok or were skipped."""
    checks = verdicts(done)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [name for name, (verdict, _) in checks.items() if verdict not in ("ok", "skip")]
    assert failed == [check], done.stdout
    assert all(word in checks[check][1] for word in words), checks[check]
    assert "1 of " in done.stdout.splitlines()[-1] and "deepspeed --hostfile" not in done.stdout


@NEEDS_SSH
def test_a_missing_key_fails_the_check_of_ssh(nodes, tiny_recipe):
    away = nodes.key.rename(nodes.key.with_name("away"))
    try:
        done = doctor(nodes, tiny_recipe)
    finally:
        away.rename(nodes.key)
    assert_failed(
        done,
        "ssh",
        "node-a, node-b",
        "-> ssh-copy-id node-a",
        "node-b",
    )


@pytest.mark.slow
@NEEDS_SSH
def test_all_checks_pass_and_the_printed_command_trains(nodes, tiny_recipe):
    done = doctor(nodes, tiny_recipe)
    checks = verdicts(done)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {verdict for verdict, _ in checks.values()} == {"ok"}
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
        "trackers",
    } == set(checks)
    assert "2 ranks" in checks["start"][1]
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
    # It is also older than setup.cfg allows.
    assert_failed(
        done,
        "versions",
        f"torch {torch.__version__} on node-a",
        "2.5.1+cu121",
        ">=2.6",
        f"torch=={torch.__version__} on node-b",
    )
    verdict, detail = verdicts(done)["start"]
    assert verdict == "skip" and "versions" in detail


@pytest.mark.slow
@NEEDS_SSH
def test_a_shard_that_is_missing_on_one_node(nodes, tiny_recipe):
    shards = Path(next(word for word in tiny_recipe if word.startswith("data.train=")).partition("=")[2])
    partial = nodes.folder / "partial"
    shutil.copytree(shards, partial)
    sorted(partial.glob("*.tar"))[1].unlink()
    with laid_over(nodes.b, partial, shards):
        done = doctor(nodes, tiny_recipe, "--no-start")
    assert_failed(done, "shards", "node-b", "data.train", str(shards), "shard-000001.tar", "-> ")


@pytest.mark.slow
@NEEDS_SSH
def test_a_port_that_is_taken(nodes, tiny_recipe):
    code = "import socket; s = socket.create_server(('', 29500)); print('ready', flush=True); input()"
    busy = nodes.a.popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert busy.stdout.readline() == "ready\n"
    command = [*DOCTOR, *tiny_recipe, f"run.dir={nodes.folder / 'run'}", "--hostfile", nodes.hostfile]
    done, other = nodes.a.run(command), None
    if done.returncode == 1:
        other = nodes.a.run([*command, "--no-start", "--master_port", "29501"])
    busy.kill()
    busy.wait()
    assert_failed(
        done,
        "port",
        "29500",
        "node-a",
        "socket.create_server",
        "--master_port 29501",
    )
    assert other.returncode == 0, other.stdout  # the fix works


@pytest.mark.slow
@NEEDS_SSH
def test_a_disk_that_is_full(nodes, tiny_recipe):
    small = f"run.dir={nodes.folder / 'small' / 'run'}"
    assert_failed(
        doctor(nodes, tiny_recipe, small, "--no-start"),
        "disk",
        "1.0 MiB free",
        "3 + 1 checkpoints",
        "run.dir",
        "checkpoint.keep",
    )
    with open(nodes.folder / "small" / "filler", "wb") as file, pytest.raises(OSError):
        while True:
            file.write(bytes(2**16))
            file.flush()
    full = doctor(nodes, tiny_recipe, small, "--no-start")
    assert_failed(full, "disk", "0.0 MiB free")
    verdict, detail = verdicts(full)["run folder"]
    assert verdict == "skip" and "disk" in detail


@pytest.mark.slow
@NEEDS_SSH
def test_other_code_on_one_node(nodes, tiny_recipe):
    loop = Path(dmae_ds.__file__).parent / "train" / "loop.py"
    other = nodes.folder / "loop.py"
    other.write_text(loop.read_text() + "\n# a line more\n")
    with laid_over(nodes.b, other, loop):
        done = doctor(nodes, tiny_recipe, "--no-start")
    assert_failed(
        done,
        "code",
        "node-b",
        "dmae_ds/train/loop.py",
        "-> ",
    )


@pytest.mark.slow
@NEEDS_SSH
def test_a_missing_interface_and_a_run_folder_that_is_not_shared(nodes, tiny_recipe):
    exports, run_dir = nodes.folder / ".deepspeed_env", nodes.folder / "kept"
    before = exports.read_text()
    run_dir.mkdir()
    nodes.b.mount_tmpfs(run_dir, size="64m")
    exports.write_text(before.replace("=eth0", "=ens5"))
    try:
        checks = verdicts(doctor(nodes, tiny_recipe, f"run.dir={run_dir}"))
    finally:
        exports.write_text(before)
        nodes.b.run(["umount", run_dir], check=True)
    assert failed_checks(checks) == {"interface", "run folder"}
    for words in ("GLOO_SOCKET_IFNAME=ens5", "echo GLOO_SOCKET_IFNAME=eth0 >> .deepspeed_env"):
        assert words in checks["interface"][1]
    for words in (str(run_dir), "node-a, node-b"):
        assert words in checks["run folder"][1]
    assert list(run_dir.iterdir()) == []


@pytest.mark.slow
@NEEDS_SSH
def test_ranks_that_hang_are_ended_and_named(nodes, tiny_recipe):
    ours = Path(dmae_ds.__file__).parent / "doctor" / "allreduce.py"
    hanging = nodes.folder / "allreduce.py"
    hanging.write_text("import time\ntime.sleep(1000)\n")
    with laid_over(nodes.b, hanging, ours):
        checks = verdicts(doctor(nodes, tiny_recipe, "--limit_s", "40"))
    assert failed_checks(checks) == {"code", "start"}
    for words in ("40 s", "1 of 2 ranks started", "0 joined"):
        assert words in checks["start"][1]


@pytest.mark.slow
@NEEDS_NODES
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_without_ssh_the_nodes_meet_and_the_first_one_prints(nodes, tiny_recipe, launcher):
    which = ["--hostfile", nodes.hostfile] if launcher == "deepspeed" else ["--num_nodes", "2"]
    command = [*DOCTOR, *tiny_recipe, f"run.dir={nodes.folder / 'run'}", *which]
    command += ["--no_ssh", "--master_addr", nodes.a.address]
    started = [
        node.popen(
            [*command, "--node_rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank, node in enumerate(nodes.nodes)
    ]
    first, second = (process.communicate(timeout=600)[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], first + second
    printed = first.splitlines()[-1]
    assert "2 ranks" in first and printed.startswith(f"{launcher} ") and "--node_rank 0" in printed
    assert len(second.splitlines()) == 1 and "node 0" in second
    assert not (nodes.folder / "run").exists() and all(node.processes() == {} for node in nodes.nodes)


@NEEDS_NODES
def test_a_node_that_does_not_come_is_named(nodes):
    command = [*DOCTOR, "--no_ssh", "--master_addr", nodes.a.address, "--num_nodes", "2", "--node_rank", "1"]
    started = nodes.b.popen([*command, "--limit_s", "2"], stderr=subprocess.PIPE, text=True)
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 1
    (line,) = errors.splitlines()
    for words in (f"{nodes.a.address}:29500", "node 0", "2 s"):
        assert words in line
