"""A probe on every node: over ssh with the words that pdsh would use, or in a process of this machine.

ssh is called directly and not through pdsh, because pdsh mixes what the nodes say and keeps ssh's reasons to itself; the
arguments, the folder, the interpreter and the exported variables are those of DeepSpeed's pdsh launcher, and the real
start (start.py) goes through the launcher itself.
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path

from dmae_ds.doctor.answer import decode_answer, encode

PDSH_SSH_ARGS = "-2 -a -x -l%u %h"  # pdsh 2.34's own
SSH_CONNECT_S = 10
AT_ONCE = 64


@dataclass(frozen=True)
class Trouble:
    """Why a node gave no facts. where: ssh, or python (the node answers, and the probe doesn't run)."""

    where: str
    what: str
    mend: str


@dataclass(frozen=True)
class Reach:
    """How nodes are reached: over ssh, or (local) this machine alone."""

    local: bool
    limit_s: float
    exports: dict[str, str] = field(default_factory=dict)
    cwd: Path = field(default_factory=Path.cwd)
    running: set[subprocess.Popen] = field(default_factory=set)

    def ask_all(self, requests: dict[str, dict]) -> dict[str, dict | Trouble]:
        """node -> its facts, all nodes at once."""
        with ThreadPoolExecutor(min(AT_ONCE, len(requests))) as pool:
            try:
                return dict(zip(requests, pool.map(self.ask, requests, requests.values())))
            except BaseException:  # Ctrl-C: the pool would wait for the slowest node
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running):
                    end_group(process)
                raise

    def ask(self, node: str, request: dict) -> dict | Trouble:
        """One node's facts; "clock" beside them: how far its clock is ahead of ours, and how far that may be off, in seconds."""
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
            return Trouble(
                "python",
                f"no answer within {self.limit_s:g} s",
                f"look for a hanging file system or GPU driver on {node}, or raise --limit_s",
            )
        finally:
            end_group(process)
            self.running.discard(process)
        facts = decode_answer(output.decode(errors="replace"))
        if process.returncode == 0 and facts is not None:
            return facts | {
                "clock": compare_clocks(start, time.time(), arrived=facts["time"], took=facts["took"])
            }
        return explain(
            node, process.returncode, errors.decode(errors="replace"), python=sys.executable, cwd=self.cwd
        )

    def command(self, node: str, request: dict) -> list[str]:
        """What is run here for a probe there."""
        probe = [
            sys.executable,
            "-u",
            "-m",
            "dmae_ds.doctor.probe",
            encode({**request, "limit_s": self.limit_s}),
        ]
        if self.local:
            return probe
        exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in self.exports.items())
        return [
            *ssh_command(node, dict(os.environ)),
            f"{exports}cd {shlex.quote(str(self.cwd))} && {shlex.join(probe)}",
        ]

    @contextmanager
    def listening(self, node: str, request: dict) -> Iterator[None]:
        """While node 0 answers on the master port. A node that doesn't is noticed by those that call it."""
        process = start_group(
            self.command(node, request),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.cwd,
        )
        try:
            for line in process.stdout:  # ends with the process, whose own alarm bounds it
                if decode_answer(line.decode(errors="replace")):
                    break
            yield
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=SSH_CONNECT_S)
            except subprocess.TimeoutExpired:
                pass
            end_group(process)


def compare_clocks(start: float, end: float, *, arrived: float, took: float) -> tuple[float, float]:
    """(how far a node's clock is ahead, how far that may be off), in seconds: asked at `start`, answered at `end` by our clock.

    arrived: by its clock when the work there began; took: how long the work was
    """
    end -= took  # had it answered at once
    return arrived - (start + end) / 2, (end - start) / 2


def start_group(command: list[str], **options) -> subprocess.Popen:
    """Popen in a process group of its own, which end_group can end without asking anybody's launcher to kill by name."""
    return subprocess.Popen(command, start_new_session=True, **options)


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started here."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def ssh_command(node: str, environment: dict[str, str]) -> list[str]:
    """ssh as pdsh calls it, but never asking for a password. PDSH_SSH_ARGS and PDSH_SSH_ARGS_APPEND count as they do there."""
    own = environment.get("PDSH_SSH_ARGS", PDSH_SSH_ARGS).replace("%u", getuser()).replace("%h", node)
    added = environment.get("PDSH_SSH_ARGS_APPEND", "")
    return [
        "ssh",
        "-oBatchMode=yes",
        f"-oConnectTimeout={SSH_CONNECT_S}",
        *shlex.split(added),
        *shlex.split(own),
    ]


def explain(node: str, code: int, errors: str, *, python: str, cwd: Path) -> Trouble:
    """ssh's, the shell's or Python's last words on a node -> what they mean."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {code}, and not a word"
    if code == 255:
        for sign, what, mend in _SSH:
            if sign in errors:
                return Trouble("ssh", what, mend.format(node=node))
        return Trouble("ssh", last, f"try `ssh {node} hostname` here until it answers without a question")
    if "No module named 'dmae_ds" in errors or "No module named dmae_ds" in errors:
        return Trouble(
            "python",
            f"dmae_ds is not installed for {python}",
            f"install it there, or start from a folder that {node} sees too",
        )
    if "cd: " in errors:
        return Trouble(
            "python",
            f"no folder {cwd}",
            f"the launcher starts ranks in the folder that you are in; start from one that {node} sees too",
        )
    if code in (126, 127):
        return Trouble(
            "python",
            f"no {python}",
            f"the launcher uses the same interpreter everywhere; install the environment at that path on {node}",
        )
    return Trouble(
        "python",
        f"the probe ended with exit code {code}: {last}",
        f"run `{python} -c 'import dmae_ds, torch'` on {node} and mend what it says",
    )


_SSH = [
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is another one than ~/.ssh/known_hosts says",
        "if the node was set up anew: ssh-keygen -R {node}, then ssh-keyscan {node} >> ~/.ssh/known_hosts",
    ),
    (
        "Host key verification failed",
        "its host key is not in ~/.ssh/known_hosts",
        "ssh-keyscan {node} >> ~/.ssh/known_hosts (compare the fingerprint with the node's)",
    ),
    (
        "Permission denied",
        "it does not accept your ssh key",
        "ssh-copy-id {node} (make a key with ssh-keygen if there is none; one with a passphrase needs ssh-agent)",
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
