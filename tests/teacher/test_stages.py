"""Stages run every block once for every owner, and all equally many, for every depth."""

from __future__ import annotations

import pytest

from dmae_ds.teacher.stages import held_blocks, route
from tests.messages import refused

CUTS = [(blocks, stages) for blocks in range(1, 41) for stages in range(1, blocks + 1)]


def test_batches_of_every_owner_pass_every_block_once_and_every_stage():
    for blocks, stages in CUTS:
        for owner in range(stages):
            cut = route(blocks, stages, owner)
            assert [block for stage in cut for block in stage] == list(range(blocks))
            assert len(cut) == stages and all(cut)


def test_every_stage_runs_as_many_blocks_a_tick_as_a_replicated_teacher():
    for blocks, stages in CUTS:
        routes = [route(blocks, stages, owner) for owner in range(stages)]
        assert {sum(len(cut[stage]) for cut in routes) for stage in range(stages)} == {blocks}


def test_a_stage_holds_what_it_runs_and_at_most_one_block_more_than_an_even_share():
    for blocks, stages in CUTS:
        routes = [route(blocks, stages, owner) for owner in range(stages)]
        for stage, held in enumerate(held_blocks(blocks, stages)):
            assert set(held) == {block for cut in routes for block in cut[stage]}
            assert len(held) <= -(-blocks // stages) + 1
            if blocks % stages == 0:
                assert len(held) == blocks // stages


def test_nine_blocks_in_two_stages_share_the_fifth():
    assert route(9, 2, 0) == [range(0, 4), range(4, 9)] and route(9, 2, 1) == [range(0, 5), range(5, 9)]
    assert held_blocks(9, 2) == [range(0, 5), range(4, 9)]


@pytest.mark.parametrize("stages", [0, 4])
def test_more_stages_than_blocks_are_refused(stages):
    with refused("3 blocks", f"{stages} stages", "teacher.stages", "1-3"):
        held_blocks(3, stages)
