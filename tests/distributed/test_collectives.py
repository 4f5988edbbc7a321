"""Collectives of objectives: values and gradients over two ranks, and no change with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmae_ds.distributed import collectives
from tests.train.conftest import free_port, run


def test_with_one_rank_nothing_is_changed():
    rows = torch.randn(3, 2, requires_grad=True)
    assert collectives.mean_over_ranks_with_gradient(rows) is rows
    gathered = collectives.gather_rows(rows)
    assert torch.equal(gathered, rows) and not gathered.requires_grad
    assert torch.equal(collectives.mean_over_ranks(rows), rows)
    assert (collectives.world_size(), collectives.rank(), collectives.is_main()) == (1, 0, True)


@pytest.mark.slow
def test_over_two_ranks_values_and_gradients_are_those_of_one(tmp_path):
    driver = Path(__file__).with_name("collectives_driver.py")
    command = ["deepspeed", "-q", "--num_gpus", "2", "--master_port", str(free_port()), str(driver)]
    done = run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"checked 0", "checked 1"} <= set(done.stdout.splitlines())
