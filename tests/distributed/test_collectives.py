"""The collectives that objectives use: over ranks, and nothing at all without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmae_ds.distributed import collectives
from tests.train.conftest import free_port, run


def test_without_other_ranks_nothing_is_changed():
    rows = torch.randn(3, 2, requires_grad=True)
    assert collectives.mean_over_ranks_with_gradient(rows) is rows
    assert (
        torch.equal(collectives.gather_rows(rows), rows) and not collectives.gather_rows(rows).requires_grad
    )
    assert torch.equal(collectives.mean_over_ranks(rows), rows) and (
        collectives.world_size(),
        collectives.rank(),
        collectives.is_main(),
    ) == (1, 0, True)


@pytest.mark.slow
def test_over_two_ranks_values_and_gradients_are_those_of_one(tmp_path):
    driver = Path(__file__).with_name("collectives_driver.py")
    done = run(
        ["deepspeed", "-q", "--num_gpus", "2", "--master_port", str(free_port()), str(driver)], cwd=tmp_path
    )
    assert done.returncode == 0 and {"checked 0", "checked 1"} <= set(done.stdout.splitlines()), (
        done.stdout + done.stderr
    )
