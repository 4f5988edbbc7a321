"""The commands that start a run the way users do (`tiny_recipe`, what they train, is in tests/conftest.py)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 900  # seconds for one start of a launcher: a bound on hangs, not on speed


def command(arguments: list[str], *, ranks: int) -> list[str]:
    """One process as `dmae-ds`, more under the real `deepspeed` launcher."""
    if ranks == 1:
        return [sys.executable, "-m", "dmae_ds", *arguments]
    return [
        "deepspeed",
        "-q",
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        "--module",
        "dmae_ds",
        *arguments,
    ]


def environment() -> dict[str, str]:
    """This interpreter's programs first, the checkout importable, from any folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}


def run(arguments: list[str], *, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT_S
    )


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
