"""Commands that start a run the way users do; `tiny_recipe`, which they train, is in tests/conftest.py."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 900  # seconds for one start of a launcher: a bound on hangs, not on speed


def command(arguments: list[str], *, ranks: int) -> list[str]:
    """The command line of one process, or of several under the real `deepspeed` launcher."""
    if ranks == 1:
        return [sys.executable, "-m", "dmae_ds", *arguments]
    return [*deepspeed(ranks), "--module", "dmae_ds", *arguments]


def deepspeed(ranks: int) -> list[str]:
    """The `deepspeed` launcher for so many ranks of this machine, to be followed by a program."""
    return ["deepspeed", "-q", "--num_gpus", str(ranks), "--master_port", str(free_port())]


def environment() -> dict[str, str]:
    """Variables with which this interpreter's programs come first and the checkout can be imported."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}


def run(arguments: list[str], *, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command line to its end."""
    return subprocess.run(
        arguments, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT_S
    )


def refusal(arguments: list[str], cwd: Path) -> str:
    """Run `dmae-ds` with arguments that it refuses; returns its one line."""
    done = run(command(arguments, ranks=1), cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dmae-ds: error: "), done.stderr
    return lines[0]


def metrics(run_dir: Path) -> list[dict]:
    """Lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """Losses of all steps of a run."""
    return [line["loss"] for line in metrics(run_dir)]


def free_port() -> int:
    """A TCP port that is free at this moment, and that the system gives to nobody who asks for any port."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
