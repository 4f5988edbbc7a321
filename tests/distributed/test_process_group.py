"""A process group of one in this process: it is left as it was found."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed

from dmae_ds.distributed import process_group
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError


@pytest.mark.parametrize("error", [None, UserError("a mistake")])
def test_a_group_of_one_leaves_no_trace_in_the_environment(monkeypatch, error):
    """An evaluation that follows in the same process must not find a launcher's variables."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "7")
    before = dict(os.environ)
    try:
        with process_group.joined(World(), timeout_s=60):
            assert os.environ["RANK"] == os.environ["LOCAL_RANK"] == "0"
            if error:
                raise error
    except UserError as raised:
        assert raised is error
    assert dict(os.environ) == before and not distributed.is_initialized()


@pytest.mark.parametrize("has_gpus", [False, True])
def test_ranks_of_a_node_share_its_cores_with_and_without_gpus(monkeypatch, has_gpus):
    threads, current = [], []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    device = process_group._set_device(World(rank=3, size=4, local_rank=3, local_size=4))
    assert threads == [3]
    assert device == torch.device("cuda:3" if has_gpus else "cpu") and current == (
        [device] if has_gpus else []
    )
