"""A tiny recipe on real images, and the commands that start it the way users do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dmae_ds.models.vit import build_student

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 900  # seconds for one start of a launcher: a bound on hangs, not on speed


@pytest.fixture(scope="session")
def tiny_recipe(digits, tmp_path_factory) -> list[str]:
    """Arguments of `dmae-ds train`: 20 steps of DMAE, batch 16, teacher 48x4 cut at 3, student 32x4."""
    weights = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
    save_file(build_student("vit_tiny_patch16_224", shape, generator=torch.Generator().manual_seed(7)).state_dict(), weights)
    return [
        "digits_dmae", f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", f"teacher.weights={weights}", "teacher.format=timm",
        "teacher.embed_dim=48", "teacher.depth=4", "teacher.num_heads=3", "student.embed_dim=32", "student.num_heads=2",
        "optim.global_batch=16", f"optim.epochs={20 * 16 / 1400}", "optim.warmup_epochs=0.05", "optim.base_lr=1e-2",
        "log.every_steps=5", "log.trackers=[]",
    ]  # fmt: skip


def command(arguments: list[str], *, ranks: int) -> list[str]:
    """One process as `dmae-ds`, more under the real `deepspeed` launcher."""
    if ranks == 1:
        return [sys.executable, "-m", "dmae_ds", *arguments]
    return ["deepspeed", "-q", "--num_gpus", str(ranks), "--master_port", str(free_port()), "--module", "dmae_ds", *arguments]


def environment() -> dict[str, str]:
    """This interpreter's programs first, the checkout importable, from any folder."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}


def run(arguments: list[str], *, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
