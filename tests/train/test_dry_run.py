"""`dmae-ds train --dry-run`: the summary of the run, and no trace of it on the disk."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import distributed

from dmae_ds.cli.main import main
from dmae_ds.distributed import process_group


@pytest.fixture
def alone(monkeypatch):
    """A process group of this process alone, without the heartbeat, which would end the tests with it."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(
        process_group, "joined", lambda world, timeout_s: contextlib.nullcontext(torch.device("cpu"))
    )
    yield
    distributed.destroy_process_group()


def test_a_dry_run_prints_the_summary_and_writes_nothing(alone, tiny_recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert main(["train", *tiny_recipe, f"run.dir={run_dir}", "--dry-run"]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"run", "data", "student"} <= set(rows)
    assert {"teacher", "objective", "batch", "schedule", "engine"} <= set(rows)
    assert not run_dir.exists()
