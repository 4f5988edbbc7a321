"""Bytes over the links in a step, by hand: ZeRO's reductions and gathers of a student of 80 M parameters."""

from __future__ import annotations

import pytest

from dmae_ds.plan.cost import Machine, step_cost
from dmae_ds.plan.memory import PRECISIONS, Zero
from dmae_ds.plan.teacher_memory import Placement
from tests.plan.conftest import geometry_of

NUM = 80_000_000
TWO_NODES = Machine(gpus=8, gpus_per_node=4, memory_gib=24)
SHARE = 7 / 8  # of a tensor that a rank sends in a ring of 8

# (ZeRO, precision): bytes of a step of 3 micro-batches before they are shared out
REDUCED_AND_GATHERED = [
    (Zero(0), "fp32", NUM * 2 * 4),  # an all-reduce is two rings, once a step
    (Zero(1), "fp32", NUM * (2 * 4 + 4)),  # and the new weights are gathered
    (Zero(1), "bf16", NUM * (2 * 2 + 2)),
    (Zero(2), "fp32", NUM * (3 * 2 * 4 + 4)),  # each micro-batch is reduced
    (Zero(2), "bf16", NUM * (3 * 2 * 2 + 2)),
    (Zero(2, reduce_once=True), "bf16", NUM * (3 * 2 + 2)),
    (Zero(1, reduce_once=True), "fp32", NUM * (4 + 4)),
    # gathered for forward, kept for backward (the reuse distance is longer than the network), reduced
    (Zero(3), "fp32", NUM * 3 * (4 + 4)),
    (Zero(3), "bf16", NUM * 3 * (2 + 2)),
    # 30 M are kept, 10 M prefetched, 40 M gathered again
    (Zero(3, reuse_distance=NUM * 3 // 4, prefetch=NUM // 8), "bf16", NUM * 3 * (2 + 1 + 2)),
    (Zero(3, reuse_distance=0, prefetch=0), "fp32", NUM * 3 * (4 + 4 + 4)),
]


@pytest.mark.parametrize(("zero", "precision", "num_bytes"), REDUCED_AND_GATHERED, ids=str)
def test_bytes_that_are_sent_in_a_step(zero, precision, num_bytes):
    cost = step_cost(
        geometry_of(parameters=NUM),
        zero,
        PRECISIONS[precision],
        TWO_NODES,
        accumulation=3,
        placed={"": Placement()},
    )
    assert cost.traffic.inside == cost.traffic.between == pytest.approx(SHARE * num_bytes)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_sharded_teacher_is_gathered_in_every_micro_batch(accumulation):
    geometry = geometry_of(parameters=NUM, blocks=18, block_bytes=10**8)
    replicated, sharded = (
        step_cost(
            geometry,
            Zero(3),
            PRECISIONS["bf16"],
            TWO_NODES,
            accumulation=accumulation,
            placed={"": Placement(placement)},
        ).traffic
        for placement in ("replicated", "zero3")
    )
    assert sharded.between - replicated.between == pytest.approx(SHARE * accumulation * 18 * 10**8)
