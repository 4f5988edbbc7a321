"""RUN/starts.jsonl: one line for each start of a run, with its config and its environment (no torch).

    {"when": "2026-11-29T15:40:00+00:00", "step": 500, "config": {...}, "environment": {...}}

environment: version and commit of this project, of Python, torch and DeepSpeed, host, device and processor of
rank 0, the number of ranks, the command line and the folder in which it was typed. Runs from before December
2026 have no such file.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dmae_ds import __version__
from dmae_ds.config.load import flatten, load_config
from dmae_ds.config.run import RunConfig
from dmae_ds.config.saved import FILE, read_starts
from dmae_ds.distributed.device import processor_name
from dmae_ds.errors import UserError
from dmae_ds.output.durable import sync_folder

# What a resumed run is compared in; the command may differ every time.
COMPARED = (
    "version",
    "commit",
    "python",
    "torch",
    "deepspeed",
    "timm",
    "host",
    "device",
    "world_size",
    "folder",
)
_PACKAGES = ("torch", "deepspeed", "timm")
_CHECKOUT = Path(__file__).resolve().parents[2]


def describe_environment(*, device: str, world_size: int) -> dict:
    """What a start runs on: plain values by name."""
    return {
        "version": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "host": socket.gethostname(),
        "device": device,
        "processor": processor_name(),
        "world_size": world_size,
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
    }


def commit(checkout: Path = _CHECKOUT) -> str | None:
    """Commit of the checkout that this program runs from, with -dirty for changes; None for a wheel."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def append_start(run_dir: Path, config: RunConfig, environment: dict, *, step: int) -> None:
    """Record a start after `step` finished steps. Call it on rank 0 alone."""
    start = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "config": config.model_dump(mode="json"),
        "environment": environment,
    }
    with open(run_dir / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")
    sync_folder(run_dir)


def changes(run_dir: Path, config: RunConfig, environment: dict) -> list[str]:
    """What differs from the last start of a run, a line each: `changed optim.base_lr 0.006 -> 0.001`.

    A config that is missing or cannot be read is no reason not to resume: the checkpoint has what must agree.
    """
    starts = read_starts(run_dir)
    path, now = run_dir / "config.yaml", flatten(config.model_dump(mode="json"))
    if not path.exists():
        lines = ["config.yaml of the last start not found: what changed is unknown"]
    else:
        try:
            lines = _changed(flatten(load_config(str(path)).model_dump(mode="json")), now)
        except UserError as error:
            lines = [f"config.yaml of the last start cannot be read: {str(error).splitlines()[0]}"]
    if starts:
        old = starts[-1]["environment"]
        new = {name: environment.get(name) for name in COMPARED}
        lines += _changed({name: old.get(name) for name in COMPARED}, new)
    return lines


def _changed(old: dict, new: dict) -> list[str]:
    return [
        f"changed {name} {_text(old, name)} -> {_text(new, name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _text(values: dict, name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else json.dumps(value)
