"""Placements, fits, the fastest, and traffic over the links: pure numbers over grids."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from dmae_ds.output.units import GIB
from dmae_ds.plan.choose import HEADROOM, candidates, choose, combinations, fastest, placements
from dmae_ds.plan.cost import (
    BAND,
    COLLECTIVE_S,
    EFFICIENCY,
    LAUNCH_S,
    Machine,
    Traffic,
    reduced_bytes,
    ring,
    step_cost,
    stream_traffic,
)
from dmae_ds.plan.memory import PRECISIONS, Zero
from dmae_ds.plan.teacher_memory import Placement
from tests.messages import refused
from tests.plan.conftest import geometry_of

ZEROS = {"zero1": Zero(1), "zero2": Zero(2, overlap=True), "zero3": Zero(3, overlap=True)}
REPLICATED = {"": Placement()}
NODE = Machine(gpus=8, gpus_per_node=8, memory_gib=24)


def rows_for(geometry, machine, **more):
    return candidates(geometry, machine, ZEROS, precision="bf16", accumulation=1, gpu=True, **more)


def test_placements_by_ranks():
    geometry = geometry_of(blocks=18)
    assert placements(geometry.teachers[""], gpus=1, gpus_per_node=1) == [("replicated", None)]
    assert placements(geometry.teachers[""], gpus=6, gpus_per_node=6) == [
        ("replicated", None),
        ("pipeline", 2),
        ("zero3", None),
    ]
    stages = [stages for _, stages in placements(geometry.teachers[""], gpus=64, gpus_per_node=8)]
    assert stages == [None, 2, 4, 8, 16, None]
    few_blocks = placements(geometry_of(blocks=3).teachers[""], gpus=8, gpus_per_node=8)
    assert [stages for _, stages in few_blocks] == [None, 2, None]
    assert combinations(replace(geometry, teachers={}), gpus=8, gpus_per_node=8) == [{}]


def test_several_teachers_are_placed_together(geometry):
    teacher = geometry.teachers[""]
    both = replace(geometry, teachers={"a": teacher, "b": replace(teacher, flops=3 * 10**12)})
    every = combinations(both, gpus=6, gpus_per_node=6)
    assert len(every) == 9 and every[0] == {"a": Placement(), "b": Placement()}
    fixed = combinations(both, gpus=6, gpus_per_node=6, fixed={"b": Placement("zero3")})
    assert len(fixed) == 3 and {placed["b"].name for placed in fixed} == {"zero3"}
    rows = rows_for(both, NODE)
    assert rows[0].name == "a replicated, b replicated"
    assert rows[0].cost.teacher_s == pytest.approx(4 * rows_for(geometry, NODE)[0].cost.teacher_s)


def test_more_memory_never_makes_a_fitting_plan_unfit(geometry):
    before = [False] * len(rows_for(geometry, NODE))
    for memory_gib in (1, 2, 4, 6, 8, 12, 16, 24, 48):
        now = [row.fits for row in rows_for(geometry, replace(NODE, memory_gib=memory_gib))]
        assert all(after or not fitted for fitted, after in zip(before, now, strict=True))
        before = now
    assert all(before)


def test_a_part_of_the_memory_stays_free_for_the_allocator(geometry):
    need = rows_for(geometry, NODE)[0].memory.total / GIB
    for memory_gib, fits in (
        (need, False),
        (need / (1 - HEADROOM) * 0.999, False),
        (need / (1 - HEADROOM) * 1.001, True),
    ):
        assert rows_for(geometry, replace(NODE, memory_gib=memory_gib))[0].fits == fits
    assert rows_for(geometry, NODE, room=need * GIB)[0].fits


def test_the_fastest_that_fits_is_no_slower_than_any_other(geometry):
    for memory_gib, blocks in product((4, 8, 12, 24), (6, 18, 60)):
        rows = rows_for(geometry_of(blocks=blocks), replace(NODE, memory_gib=memory_gib))
        best = fastest(rows)
        assert (best is None) == (not any(row.fits for row in rows))
        if best is not None:
            assert best.fits and all(best.ranked_s <= 1.1 * row.ranked_s for row in rows if row.fits)


def test_equals_choose_the_replicated_teacher_and_little_memory_the_pipeline():
    geometry = geometry_of(blocks=60)  # 6 GB of teacher
    assert choose(rows_for(geometry, NODE, room=24e9), room=24e9).name == "replicated"
    room = min(row.memory.total for row in rows_for(geometry, NODE) if row.name == "replicated") - 1
    assert choose(rows_for(geometry, NODE, room=room), room=room).placed[""].name == "pipeline"


def test_where_nothing_fits_one_line_has_the_least_that_is_needed(geometry):
    rows = rows_for(geometry, NODE, room=1e9)
    least = min(row.memory.total for row in rows) / 2**30
    with refused("teacher.placement auto", "0.9 GiB", f"{least:.1f} GiB", "optim.micro_batch"):
        choose(rows, room=1e9)


def test_a_ring_sends_all_but_one_share_and_a_node_as_much_as_a_rank():
    assert ring(800, NODE, calls=1).inside == 700 and ring(800, NODE, calls=1).between == 0
    two = ring(1600, replace(NODE, gpus=16), calls=1)
    assert two.inside == two.between == 1500
    assert ring(800, replace(NODE, gpus=1, gpus_per_node=1), calls=1) == Traffic()


def test_a_pipeline_inside_a_node_sends_nothing_between_nodes(geometry):
    machine = replace(NODE, gpus=32)
    for stages in (2, 4, 8):
        assert stream_traffic(geometry.teachers[""], stages, machine).between == 0
    assert stream_traffic(geometry.teachers[""], 16, machine).between > 0


def test_bytes_that_a_stage_sends(geometry):
    """P = 2: stage 1 sends its own tokens and a feature to stage 0, which sends two outputs to stage 1."""
    teacher = geometry.teachers[""]
    travelling = teacher.token_bytes + teacher.id_bytes
    assert stream_traffic(teacher, 2, NODE).inside == max(2 * travelling, travelling + teacher.feature_bytes)


def test_teacher_flops_do_not_depend_on_the_placement_and_links_only_slow():
    geometry = geometry_of()
    for placement in placements(geometry.teachers[""], gpus=8, gpus_per_node=8):
        fast, slow = (
            step_cost(
                geometry,
                ZEROS["zero2"],
                PRECISIONS["bf16"],
                replace(NODE, node_link_gbps=rate),
                accumulation=2,
                placed={"": placement},
            )
            for rate in (1e15, 1.0)
        )
        exchanges = 0 if placement.name == "replicated" else 2 * 18 * COLLECTIVE_S  # one a block, at most
        assert 0 <= fast.teacher_s - 2 * 10**12 / (300e12 * EFFICIENCY) <= exchanges
        assert slow.teacher_s >= fast.teacher_s
        assert slow.student_s > fast.student_s and slow.traffic == fast.traffic


def test_twice_the_accumulation_is_twice_the_work(geometry):
    for zero in ZEROS.values():
        one, two = (
            step_cost(geometry, zero, PRECISIONS["fp32"], NODE, accumulation=count, placed=REPLICATED)
            for count in (1, 2)
        )
        assert two.teacher_s == 2 * one.teacher_s
        assert one.student_s < two.student_s <= 2 * one.student_s * 1.0001
    assert one.traffic.times(2) == two.traffic  # ZeRO-3 gathers and scatters for every micro-batch


def cost_of(geometry, zero=ZEROS["zero2"], precision="bf16", machine=NODE, **more):
    settings = {"accumulation": 1, "placed": REPLICATED, **more}
    return step_cost(geometry, zero, PRECISIONS[precision], machine, **settings)


def test_fp32_products_have_a_rate_of_their_own(geometry):
    teacher = replace(geometry, teachers={"": replace(geometry.teachers[""], products="fp32")})
    assert cost_of(teacher).teacher_s == pytest.approx(2 * cost_of(geometry).teacher_s)
    exact = replace(NODE, tf32=False)
    assert cost_of(teacher, machine=exact).teacher_s == pytest.approx(16 * cost_of(geometry).teacher_s)
    slow = replace(NODE, fp32_tflops=20.0)
    assert cost_of(teacher, machine=slow).teacher_s == pytest.approx(15 * cost_of(geometry).teacher_s)
    assert cost_of(geometry, machine=slow).seconds == cost_of(geometry).seconds
    assert cost_of(geometry, precision="fp32").student_s > 1.9 * cost_of(geometry).student_s


def test_the_band_is_that_of_the_published_shares(geometry):
    for row in rows_for(geometry, NODE):
        assert list(row.band) == sorted(row.band, reverse=True) and len(row.band) == len(BAND)
        assert row.band[BAND.index(EFFICIENCY)] == row.cost.seconds


def test_a_bucket_that_holds_all_gradients_hides_nothing(geometry):
    """Backward takes long enough for all but the last bucket."""
    n, bucket = geometry.student.parameters, 20_000_000
    whole, cut = (cost_of(geometry, Zero(2, overlap=True, reduce_bucket=size)) for size in (n, bucket))
    never = cost_of(geometry, Zero(2, reduce_bucket=n))
    assert whole.student_s == never.student_s
    exposed, hidden = whole.student_s, cut.student_s
    compute = 3 * 10**12 / (300e12 * EFFICIENCY)
    assert compute < hidden < exposed
    assert hidden - compute == pytest.approx((exposed - compute) * bucket / n, rel=0.2)


def test_gradients_are_counted_in_the_dtype_in_which_they_travel(geometry):
    vectors = tuple(
        replace(gradient, is_matrix=number % 2 == 0)
        for number, gradient in enumerate(geometry.student.gradients)
    )
    student, n = replace(geometry.student, gradients=vectors), geometry.student.parameters
    sizes = {
        precision: reduced_bytes(student, Zero(2), PRECISIONS[precision]) / n for precision in PRECISIONS
    }
    assert sizes == {"fp32": 4, "bf16_autocast": 3, "bf16": 2, "fp16": 2}
    assert reduced_bytes(student, Zero(2, reduce_fp32=True), PRECISIONS["bf16_autocast"]) == 4 * n


def test_small_micro_batches_wait_for_the_host(geometry):
    """A step of 8 micro-batches launches eight times as many kernels as one of all images."""
    small = replace(
        geometry,
        student=replace(
            geometry.student, forward_flops=0, backward_flops=0, forward_kernels=700, backward_kernels=1000
        ),
        teachers={},
    )
    zero = Zero(1)
    one, eight = (cost_of(small, zero, accumulation=count, placed={}) for count in (1, 8))
    assert eight.student_s - one.student_s == pytest.approx(7 * 1700 * LAUNCH_S)


def test_a_student_of_80_million_parameters_is_not_sharded_for_its_speed():
    """ZeRO-3's hooks run on the host, twice for each of its 125 modules."""
    geometry = geometry_of(layers=250)
    for machine in (NODE, replace(NODE, gpus=64, memory_gib=80)):
        assert choose(rows_for(geometry, machine, room=80e9), room=80e9).deepspeed != "zero3"
