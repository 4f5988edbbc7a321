"""The two nodes of other tests: separate networks, processes and disks, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.multi_node.nodes import REPOSITORY, TwoNodes, available, ssh_available


@pytest.fixture(autouse=True)
def possible():
    if reason := available():
        pytest.skip(f"NOTHING RUN OVER TWO NODES: {reason}")


def reaches(node, name: str) -> bool:
    """Whether SERVER, running on the node of this name, answers a node within a second."""
    script = f"exec 3<>/dev/tcp/{name}/7000 && read -r line <&3"
    return node.run(["timeout", "1", "bash", "-c", script]).returncode == 0


SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
print("up", flush=True)
while True:
    server.accept()[0].sendall(b"here\\n")
"""


def test_each_has_its_own_name_network_processes_and_disks_and_shares_the_files(tmp_path):
    with TwoNodes(tmp_path, node_environment={"node-b": {"ONLY": "b"}}, ssh=False) as nodes:
        for node in nodes.nodes:
            assert node.run(["hostname"]).stdout.strip() == node.name
        server = nodes.b.popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
        assert server.stdout.readline() == "up\n"
        assert reaches(nodes.a, "node-b") and not reaches(nodes.a, "node-a")
        nodes.b.cut()
        assert not reaches(nodes.a, "node-b")
        nodes.b.join()
        assert reaches(nodes.a, "node-b")
        assert len(nodes.b.processes()) == 1 and not nodes.a.processes()

        nodes.a.run(["bash", "-c", "echo text > shared"], check=True)
        assert nodes.b.run(["bash", "-c", "cat shared; echo $ONLY"]).stdout.split() == ["text", "b"]
        private = tmp_path / "private"
        private.mkdir()
        nodes.b.mount_tmpfs(private, size="64k")
        assert nodes.b.run(["dd", "if=/dev/zero", f"of={private}/full", "bs=128k", "count=1"]).returncode != 0
        assert not list(private.iterdir())  # it was written to the private disk
        nodes.b.hide(tmp_path / "shared")
        assert not nodes.b.run(["cat", "shared"], check=True).stdout
        assert nodes.a.run(["cat", "shared"]).stdout == "text\n"

        server.terminate()  # reaches the command itself
        assert server.wait(10) == -signal.SIGTERM
        nodes.a.popen(["bash", "-c", "sleep 1000 & exit"]).wait()
        nodes.a.kill_all()
        assert not nodes.a.processes()
        inits = [node.pid for node in nodes.nodes]
    assert not any(Path(f"/proc/{pid}").exists() for pid in inits)


def test_everything_ends_when_its_maker_is_killed(tmp_path):
    script = f"""
import time
from tests.multi_node.nodes import TwoNodes
with TwoNodes({str(tmp_path)!r}) as nodes:
    nodes.a.popen(["sleep", "1000"])
    while not nodes.a.processes(): time.sleep(.01)
    print(nodes.a.pid, nodes.b.pid, *nodes.a.processes(), flush=True)
    time.sleep(1000)
"""
    maker = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    pids = maker.stdout.readline().split()
    assert len(pids) == 3
    maker.kill()
    maker.wait()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "a node outlived its maker"
        time.sleep(0.05)


def test_ssh_and_pdsh_reach_both(tmp_path):
    if reason := ssh_available():
        pytest.skip(f"NOT RUN OVER SSH: {reason}")
    with TwoNodes(tmp_path) as nodes:
        done = nodes.a.run(["pdsh", "-R", "ssh", "-S", "-w", "node-a,node-b", "hostname; exit 75"])
        assert sorted(done.stdout.splitlines()) == ["node-a: node-a", "node-b: node-b"]
        assert done.returncode == 75
        nodes.key.rename(tmp_path / "away")
        assert nodes.a.run(["ssh", "node-b", "true"]).returncode == 255
