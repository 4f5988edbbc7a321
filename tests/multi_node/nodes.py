"""Two nodes on one machine, for tests of launchers, collectives and broken links.

A node is a set of Linux namespaces: its own network (joined to the other's by a veth pair), processes,
mounts, host name, shared memory, /run and sshd. The repository and /tmp are the same in both, like a
cluster's shared file system. `ssh node-b` works inside. It requires root, `unshare`, `nsenter` and `ip`; ssh
and pdsh only where a test asks for them:

    with TwoNodes(tmp_path) as nodes:
        nodes.a.run(["ssh", "node-b", "hostname"])
        nodes.b.cut()

Everything ends with the process that made it, also when that is killed: process 1 of a node reads from a pipe
of this process, and the kernel ends a node whose process 1 ends. No namespace or link has a name outside.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
INTERFACE = "eth0"
NAMES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
LIMIT_S = 600  # a bound on hangs
UNSHARE = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--net", "--ipc"]


@functools.cache
def available() -> str | None:
    """Why two nodes cannot be built here, or None. For ssh, see `ssh_available`."""
    if os.geteuid() != 0:
        return "not root: namespaces and veth links cannot be made"
    for program in ("unshare", "nsenter", "ip", "mount", "setpriv", "taskset"):
        if shutil.which(program) is None:
            return f"no `{program}`"
    tried = subprocess.run(
        [*UNSHARE, "ip", "link", "add", "one", "type", "veth", "peer", "name", "two"],
        capture_output=True,
        text=True,
    )
    if tried.returncode != 0:
        return f"namespaces or veth links are not allowed: {tried.stderr.strip()}"
    return None


@functools.cache
def ssh_available() -> str | None:
    """Why `deepspeed --hostfile` over ssh and pdsh cannot be run here, or None."""
    programs = ("ssh", "ssh-keygen", "/usr/sbin/sshd", "pdsh")
    missing = [program for program in programs if shutil.which(program) is None]
    if missing and available() is None:
        return f"no {', '.join(missing)} (apt-get install openssh-server pdsh)"
    return available()


class Process(subprocess.Popen):
    """A command inside a node; a signal goes to the command, not to the `nsenter` that waits for it."""

    def inner(self) -> int | None:
        """Process id of the command, outside the node; None before it runs and after it ended."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return int(children[0]) if children else None

    def send_signal(self, sig: int) -> None:
        end = time.monotonic() + 10
        while self.poll() is None and time.monotonic() < end:
            if (inner := self.inner()) is not None:
                os.kill(inner, sig)
                return
            time.sleep(0.01)


class Node:
    """One of the two nodes; `folder` is its own, in the shared file system."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]):
        self.name = name
        self.address = NAMES[name]
        self.folder = folder
        self.environment = environment
        folder.mkdir(parents=True, exist_ok=True)
        # Process 1 reports that its mounts are done, adopts orphans, and ends when our end of the pipe
        # closes.
        script = f"""
            hostname {name}
            mount --bind {folder.parent}/hosts /etc/hosts
            if [ -e {folder.parent}/ssh_config ]; then
                mount --bind {folder.parent}/ssh_config /etc/ssh/ssh_config
            fi
            mount -t tmpfs none /dev/shm && mount -t tmpfs none /run && mkdir -p /run/sshd || exit 1
            ip link set lo up && echo ready && read -r || exit 1
        """
        arguments = [*UNSHARE, "bash", "-e", "-c", script]
        self._init = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = self._init.stdout.readline()
        assert line == "ready\n", f"{name} did not start"
        self.pid = int(Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text())

    def popen(self, command: list[str], *, env: dict[str, str] | None = None, **options) -> Process:
        """Start a command inside the node.

        It is killed with the returned process; processes that it started end with the node.
        """
        # One core for each node: as many threads, and so the same rounding, as for two ranks of one node.
        cores = sorted(os.sched_getaffinity(0))
        core = cores[list(NAMES).index(self.name) % len(cores)]
        enter = ["taskset", "--cpu-list", str(core)]
        enter += ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--uts", "--ipc"]
        # env -C inside the node: nsenter's --wd would open the folder outside, without this node's mounts.
        enter += ["setpriv", "--pdeathsig", "KILL", "--"]
        enter += ["env", "-C", str(options.pop("cwd", self.folder.parent))]
        environment = {**os.environ, **self.environment, **(env or {})}
        return Process([*enter, *map(str, command)], env=environment, **options)

    def run(
        self,
        command: list[str],
        *,
        env: dict[str, str] | None = None,
        timeout: float = LIMIT_S,
        check: bool = False,
        **options,
    ):
        """Run a command inside the node to its end; returns a CompletedProcess with its text."""
        process = self.popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        assert not check or done.returncode == 0, f"{self.name}: {command}: {out}{err}"
        return done

    def processes(self) -> dict[int, str]:
        """Command lines of the node's processes by process id (outside), without process 1 and sshd's."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        lines = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            try:
                if os.readlink(entry / "ns" / "pid") != namespace:
                    continue
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # ended since, or not of this container
            # A zombie has no command line.
            if line and not line.startswith("sshd:") and "sshd -D" not in line:
                lines[int(entry.name)] = line
        return lines

    def kill_all(self) -> None:
        """Kill all processes of this node, as if the power had failed; sshd and the network stay."""
        while pids := self.processes():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.01)

    def cut(self) -> None:
        """Cut this node's link: packets vanish without an answer, connections stay open on both sides."""
        self.run(["ip", "link", "set", INTERFACE, "down"], check=True)

    def join(self) -> None:
        """Connect this node's link, at the start or after `cut`."""
        self.run(["ip", "link", "set", INTERFACE, "up"], check=True)

    def mount_tmpfs(self, path: Path, *, size: str) -> None:
        """Mount a small private disk over a folder, in this node alone; size as in "64m"."""
        self.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=True)

    def hide(self, path: Path) -> None:
        """Hide a path behind an empty file or folder, in this node alone."""
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        (self.folder / "empty.file").touch()
        self.run(
            ["mount", "--bind", empty if path.is_dir() else self.folder / "empty.file", path], check=True
        )

    def close(self) -> None:
        self._init.stdin.close()
        try:
            self._init.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._init.kill()
            self._init.wait()
        self._init.stdout.close()


class TwoNodes:
    """Nodes `a` and `b`, joined; `hostfile` names both with one slot each. Use it as a context manager.

    folder: for hosts, keys, logs and the nodes' folders; commands start there. It must be on an ordinary disk
    environment: more variables for all commands, also for those that ssh starts
    node_environment: more variables for one node, {"node-b": {...}}
    ssh: start an sshd in each node; None: if it is installed
    """

    def __init__(
        self,
        folder: Path,
        *,
        environment: dict[str, str] | None = None,
        node_environment: dict[str, dict[str, str]] | None = None,
        ssh: bool | None = None,
    ):
        self.folder = Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ssh = ssh_available() is None if ssh is None else ssh
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])
        self.environment = {
            "PATH": path,
            "PYTHONPATH": str(REPOSITORY),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "LC_ALL": "C.UTF-8",
            **(environment or {}),
        }
        self._node_environment = node_environment or {}
        self.hostfile = self.folder / "hostfile"
        self.key = self.folder / "ssh_key"  # tests move it away
        self._sshd: list[Process] = []

    def __enter__(self) -> TwoNodes:
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in NAMES.items())
        )
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in NAMES))
        # Variables that pdsh carries to the other node; DeepSpeed reads this file from its working directory.
        carried = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
        (self.folder / ".deepspeed_env").write_text(
            "".join(f"{name}={self.environment[name]}\n" for name in carried)
        )
        if self.ssh:
            self._write_ssh()
        try:
            self.a, self.b = (
                Node(name, self.folder / name, {**self.environment, **self._node_environment.get(name, {})})
                for name in NAMES
            )
            link = f"{INTERFACE} netns {self.a.pid} type veth peer name {INTERFACE} netns {self.b.pid}"
            subprocess.run(["ip", "link", "add", *link.split()], check=True)
            for node in self.nodes:
                node.run(["ip", "address", "add", f"{node.address}/24", "dev", INTERFACE], check=True)
                node.join()
                if self.ssh:
                    self._start_sshd(node)
            for node in self.nodes:  # the kernel may say "running" a second later; the doctor looks for it
                wait = f"until ip link show {INTERFACE} | grep -q 'state UP'; do sleep .05; done"
                node.run(["bash", "-c", wait], timeout=30, check=True)
            for node in self.nodes if self.ssh else ():
                wait = f"until (exec 3<>/dev/tcp/{node.address}/22) 2>/dev/null; do sleep .05; done"
                node.run(["bash", "-c", wait], timeout=30, check=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.a, self.b

    def _write_ssh(self) -> None:
        for key in (self.key, self.folder / "host_key"):
            if not key.exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        shutil.copy(self.key.with_suffix(".pub"), self.folder / "authorized_keys")
        (self.folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {self.key}\n  IdentitiesOnly yes\n  User root\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
            "  PasswordAuthentication no\n"
        )

    def _start_sshd(self, node: Node) -> None:
        config = node.folder / "sshd_config"
        config.write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/authorized_keys\n"
            "StrictModes no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nUsePAM no\nPidFile none\nUseDNS no\nMaxStartups 100\n"
            "SetEnv " + " ".join(f'"{name}={value}"' for name, value in node.environment.items()) + "\n"
        )
        with open(node.folder / "sshd.log", "ab") as log:
            self._sshd.append(
                node.popen(["/usr/sbin/sshd", "-D", "-e", "-f", config], stdout=log, stderr=log)
            )

    def __exit__(self, *_) -> None:
        for node in (getattr(self, name, None) for name in "ab"):
            if node is not None:
                node.close()
        for process in self._sshd:
            process.wait()
