"""Nodes are asked by a process on each that reports facts, started over ssh as pdsh does, or on this machine.

ssh is called directly and not through pdsh, because pdsh mixes the output of the nodes and hides ssh's
reasons. The arguments, the folder, the interpreter and the exported variables are those of DeepSpeed's pdsh
launcher, and the real start (start.py) goes through the launcher itself.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

from dmae_ds.doctor.answer import decode_answer, encode

PDSH_SSH_ARGS = "-2 -a -x -l%u %h"  # the default of pdsh 2.34
SSH_CONNECT_S = 10
MAX_AT_ONCE = 64


@dataclass(frozen=True)
class Trouble:
    """Why a node gave no facts. where: "ssh", or "python" if the node answers and the process there fails."""

    where: str
    what: str
    fix: str


@dataclass(frozen=True)
class Reach:
    """How nodes are reached: over ssh, or (local) this machine alone."""

    local: bool
    limit_s: float
    exports: dict[str, str] = field(default_factory=dict)
    cwd: Path = field(default_factory=Path.cwd)
    running: set[subprocess.Popen] = field(default_factory=set)

    def ask_all(self, requests: dict[str, dict]) -> dict[str, dict | Trouble]:
        """Ask all nodes at once; returns {node: its facts, or why there are none}."""
        with ThreadPoolExecutor(min(MAX_AT_ONCE, len(requests))) as pool:
            try:
                answers = pool.map(self.ask, requests, requests.values())
                return dict(zip(requests, answers, strict=True))
            except BaseException:  # Ctrl-C: the pool would wait for the slowest node
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    end_group(process)
                raise

    def ask(self, node: str, request: dict) -> dict | Trouble:
        """Ask one node for its facts.

        Its "clock" is how far its clock is ahead of ours, and the possible error of that, in seconds.
        """
        start = time.time()
        process = start_group(
            self.command(node, request),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.cwd,
        )
        self.running.add(process)
        try:
            output, errors = process.communicate(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            fix = f"look for a hanging file system or GPU driver on {node}, or raise --limit_s"
            return Trouble("python", f"no answer within {self.limit_s:g} s", fix)
        finally:
            end_group(process)
            self.running.discard(process)
        facts = decode_answer(output.decode(errors="replace"))
        if process.returncode == 0 and facts is not None:
            clock = compare_clocks(start, time.time(), arrived=facts["time"], took=facts["took"])
            return {**facts, "clock": clock}
        text = errors.decode(errors="replace")
        return explain(node, process.returncode, text, python=sys.executable, cwd=self.cwd)

    def command(self, node: str, request: dict) -> list[str]:
        """The command of this machine that inspects a node."""
        word = encode({**request, "limit_s": self.limit_s})
        inspect = [sys.executable, "-u", "-m", "dmae_ds.doctor.inspect_node", word]
        if self.local:
            return inspect
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in self.exports.items())
        remote = f"{exports}cd {shlex.quote(str(self.cwd))} && {shlex.join(inspect)}"
        return [*make_ssh_command(node, dict(os.environ)), remote]

    @contextmanager
    def listening(self, node: str, request: dict) -> Iterator[None]:
        """Let node 0 answer on the master port during the context; if it doesn't, its callers notice."""
        process = start_group(
            self.command(node, request),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.cwd,
        )
        try:
            for line in process.stdout:  # ends with the process, which is bounded by its own alarm
                if decode_answer(line.decode(errors="replace")):
                    break
            yield
        finally:
            process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=SSH_CONNECT_S)
            end_group(process)


def compare_clocks(start: float, end: float, *, arrived: float, took: float) -> tuple[float, float]:
    """How far a node's clock is ahead, and the possible error of that, in seconds.

    start, end: when it was asked and when its answer arrived, by our clock
    arrived: when the work began, by its clock; took: the length of the work
    """
    end -= took  # as if it had answered at once
    return arrived - (start + end) / 2, (end - start) / 2


def start_group(command: list[str], **options) -> subprocess.Popen:
    """Start a process in a group of its own, which `end_group` can end as a whole."""
    return subprocess.Popen(command, start_new_session=True, **options)


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started on this machine."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_ssh_command(node: str, environment: dict[str, str]) -> list[str]:
    """The ssh command that pdsh would use, but never asking for a password.

    PDSH_SSH_ARGS and PDSH_SSH_ARGS_APPEND have the same meaning as for pdsh.
    """
    arguments = environment.get("PDSH_SSH_ARGS", PDSH_SSH_ARGS).replace("%u", getuser()).replace("%h", node)
    appended = environment.get("PDSH_SSH_ARGS_APPEND", "")
    options = ["-oBatchMode=yes", f"-oConnectTimeout={SSH_CONNECT_S}"]
    return ["ssh", *options, *shlex.split(appended), *shlex.split(arguments)]


def explain(node: str, code: int, errors: str, *, python: str, cwd: Path) -> Trouble:
    """What the last words of ssh, the shell or Python on a node mean, and what to do."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {code} without a message"
    if code == 255:
        for pattern, what, fix in _SSH_ERRORS:
            if pattern in errors:
                return Trouble("ssh", what, fix.format(node=node))
        return Trouble("ssh", last, f"try `ssh {node} hostname` here until it answers without a question")
    if "No module named 'dmae_ds" in errors or "No module named dmae_ds" in errors:
        fix = f"install it there, or start from a folder that {node} sees too"
        return Trouble("python", f"dmae_ds is not installed for {python}, or in another version", fix)
    if "cd: " in errors:
        fix = f"the launcher starts ranks in your current folder; start from one that {node} sees too"
        return Trouble("python", f"no folder {cwd}", fix)
    if code in (126, 127):
        fix = (
            "the launcher uses the same interpreter everywhere; "
            f"install the environment at that path on {node}"
        )
        return Trouble("python", f"no {python}", fix)
    fix = f"run `{python} -c 'import dmae_ds, torch'` on {node} and fix what it reports"
    return Trouble("python", f"the inspection ended with exit code {code}: {last}", fix)


# (part of ssh's message, what it means, what to do)
_SSH_ERRORS = [
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key differs from the one in ~/.ssh/known_hosts",
        "if the node was reinstalled: ssh-keygen -R {node}, then ssh-keyscan {node} >> ~/.ssh/known_hosts",
    ),
    (
        "Host key verification failed",
        "its host key is not in ~/.ssh/known_hosts",
        "ssh-keyscan {node} >> ~/.ssh/known_hosts (compare the fingerprint with the node's)",
    ),
    (
        "Permission denied",
        "it does not accept your ssh key",
        "ssh-copy-id {node} (ssh-keygen makes a key; one with a passphrase needs ssh-agent)",
    ),
    (
        "Could not resolve hostname",
        "no such host name",
        "put the name that `ssh NAME` knows into the hostfile, or {node} into /etc/hosts",
    ),
    (
        "Connection refused",
        "no sshd answers",
        "start sshd on {node}, or give its port in ~/.ssh/config; without ssh: --no_ssh on every node",
    ),
    ("Connection timed out", "it does not answer", "is {node} up, and its port 22 open to this machine?"),
    (
        "No route to host",
        "there is no route to it",
        "is {node} up, and in a network that this machine reaches?",
    ),
    ("Connection closed by", "sshd closes the connection", "read sshd's log on {node} (journalctl -u ssh)"),
]
