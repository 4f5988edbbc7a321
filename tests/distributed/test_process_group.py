"""A process group of one in this process: it is left as it was found."""

from __future__ import annotations

import os

import pytest
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
