"""Mistakes in what all ranks share are raised in each of them, and printed by one."""

from __future__ import annotations

import pytest

from dmae_ds.cli.ranks import same_on_every_rank
from dmae_ds.distributed.tasks import find_task
from dmae_ds.distributed.world import World
from dmae_ds.errors import RunFailed, UserError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert find_task() is None


@pytest.mark.parametrize("error, is_marked", [(UserError("x"), True), (RunFailed("x"), False)])
def test_only_a_mistake_is_marked_and_none_is_swallowed(error, is_marked):
    with pytest.raises(type(error)) as raised, same_on_every_rank() as world:
        assert world == World()
        raise error
    assert raised.value is error and error.on_every_rank == is_marked


def test_a_mistake_in_the_variables_of_the_ranks_is_marked(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as raised, same_on_every_rank():
        pass
    assert raised.value.on_every_rank
