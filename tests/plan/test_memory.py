"""Bytes over grids of placements, ranks and precisions, and agreement with DeepSpeed's own estimators."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from dmae_ds.config.deepspeed import load_deepspeed
from dmae_ds.plan.memory import PARTS, PRECISIONS, Zero, rank_memory, student_memory
from dmae_ds.plan.teacher_memory import Placement, message_bytes, stream_bytes, teacher_bytes
from dmae_ds.plan.trace import Gradient, Trace
from tests.plan.conftest import geometry_of

GRID = list(product((0, 1, 2, 3), PRECISIONS, (1, 2, 8, 64), (1, 4), (False, True)))


def pipeline(stages):
    return {"": Placement("pipeline", stages)}


def memory(geometry, stage, precision, ranks, accumulation, gpu, **more):
    return rank_memory(
        geometry,
        Zero(stage),
        precision=precision,
        ranks=ranks,
        accumulation=accumulation,
        placed={"": Placement()},
        gpu=gpu,
        **more,
    )


@pytest.mark.parametrize("stage, precision, ranks, accumulation, gpu", GRID)
def test_parts_sum_to_the_total_and_none_is_negative(geometry, stage, precision, ranks, accumulation, gpu):
    total = memory(geometry, stage, precision, ranks, accumulation, gpu)
    parts = [getattr(total, part) for part in PARTS]
    assert total.total == sum(parts) and min(parts) >= 0
    assert total.host == 0


@pytest.mark.parametrize("stage, precision, gpu", list(product((1, 2, 3), PRECISIONS, (False, True))))
def test_more_ranks_never_take_more_and_optimizer_states_are_divided(geometry, stage, precision, gpu):
    totals = [memory(geometry, stage, precision, ranks, 1, gpu).total for ranks in (1, 2, 4, 8, 16)]
    assert totals == sorted(totals, reverse=True) and totals[0] > totals[-1]
    # Without activations the step decides, and all that ZeRO cuts of it falls with the ranks.
    light = geometry_of(activations=0)
    one, eight = (memory(light, stage, precision, ranks, 1, gpu).optimizer for ranks in (1, 8))
    assert eight < 0.7 * one


@pytest.mark.parametrize("stages", [2, 3, 6, 9])
def test_a_teacher_s_blocks_fall_p_fold(geometry, stages):
    teacher = geometry.teachers[""]
    whole = teacher_bytes(teacher, Placement(), 72)
    assert whole == teacher.weight_bytes
    assert (
        teacher_bytes(teacher, Placement("pipeline", stages), 72) - teacher.embedding_bytes
        == (whole - teacher.embedding_bytes) / stages
    )


def test_where_blocks_divide_unevenly_a_stage_holds_one_more():
    teacher = geometry_of(blocks=9).teachers[""]
    assert teacher_bytes(teacher, Placement("pipeline", 2), 2) == teacher.embedding_bytes + 5 * 10**8


def test_the_rank_that_holds_most_is_planned():
    teacher = replace(geometry_of().teachers[""], block_bytes=(1, 1, 5, 5), embedding_bytes=0)
    assert teacher_bytes(teacher, Placement("pipeline", 2), 2) == 10


def test_a_sharded_teacher_is_a_share_and_two_blocks(geometry):
    assert teacher_bytes(geometry.teachers[""], Placement("zero3"), 8) == 10**7 + 18 * 10**8 / 8 + 2 * 10**8


def test_the_stream_s_queue_grows_with_its_stages(geometry):
    one = stream_bytes(geometry, {"": Placement()})
    assert one == geometry.batch_bytes + geometry.teachers[""].feature_bytes
    sizes = [one, *(stream_bytes(geometry, pipeline(stages)) for stages in (2, 4, 8))]
    assert sizes == sorted(sizes)
    assert all(size > 2 * stages * one for size, stages in zip(sizes[1:], (2, 4, 8), strict=True))
    teacher = geometry.teachers[""]
    heavier = replace(geometry, teachers={"": replace(teacher, feature_bytes=teacher.feature_bytes + 1000)})
    # 2P features that arrived wait; one is in the buffer that is sent, P in the two that receive.
    for stages in (2, 4, 8):
        more = stream_bytes(heavier, pipeline(stages)) - stream_bytes(geometry, pipeline(stages))
        assert more >= 2 * stages * 1000


def test_of_several_teachers_a_queue_holds_the_features_of_those_before_it(geometry):
    teacher = geometry.teachers[""]
    both = replace(geometry, teachers={"a": teacher, "b": teacher})
    replicated, piped = Placement(), Placement("pipeline", 4)
    one, features = stream_bytes(geometry, {"": piped}), teacher.feature_bytes
    assert stream_bytes(both, {"a": replicated, "b": replicated}) == geometry.batch_bytes + 2 * features
    assert stream_bytes(both, {"a": piped, "b": replicated}) == one + features
    assert stream_bytes(both, {"a": replicated, "b": piped}) == one + features + 2 * 4 * features
    held = rank_memory(
        both,
        Zero(1),
        precision="bf16",
        ranks=8,
        accumulation=1,
        placed={"a": piped, "b": replicated},
        gpu=True,
    )
    assert held.teacher == teacher_bytes(teacher, piped, 8) + teacher.weight_bytes


def test_messages_are_those_of_the_stream():
    """Compared with the stream's own layout, up to headers and alignment."""
    import torch

    from dmae_ds.teacher.messages import Layout
    from dmae_ds.teacher.stages import route

    for stages in (2, 3, 4):
        taps = tuple(
            tuple(tuple(["block/18"] if 17 in blocks else []) for blocks in route(18, stages, owner))
            for owner in range(stages)
        )
        layout = Layout(taps, 16, (50, 64), 49, {"block/18": (50, 64)}, torch.float32)
        teacher = replace(
            geometry_of().teachers[""],
            token_bytes=16 * 50 * 64 * 4,
            id_bytes=16 * 49 * 8,
            feature_bytes=16 * 50 * 64 * 4,
        )
        for source, target in product(range(stages), repeat=2):
            assert layout.size(source, target) == pytest.approx(
                message_bytes(teacher, stages, source=source, target=target), abs=256
            )


def test_offloading_moves_states_to_the_host():
    geometry = geometry_of(activations=0)
    kept = memory(geometry, 3, "bf16", 4, 1, True)
    zero = Zero(3, offload_optimizer=True, offload_parameters=True)
    moved = rank_memory(
        geometry, zero, precision="bf16", ranks=4, accumulation=1, placed={"": Placement()}, gpu=True
    )
    assert kept.host == 0 and moved.optimizer == 0 and moved.total < kept.total
    # Masters and moments, gradients, weights.
    assert moved.host == (12 + 2 + 2) * geometry.student.parameters / 4


def test_buckets_are_held_whole_on_a_gpu_and_as_far_as_written_on_a_cpu(geometry):
    parameters = geometry.student.parameters
    gpu, cpu = (memory(geometry, 2, "fp32", 2, 1, gpu) for gpu in (True, False))
    assert gpu.gradients >= 4 * 500_000_000 and cpu.gradients <= 2 * 4 * parameters
    twice = student_memory(
        geometry.student, Zero(2, overlap=True), PRECISIONS["fp32"], ranks=2, accumulation=1, gpu=True
    )
    once = student_memory(geometry.student, Zero(2), PRECISIONS["fp32"], ranks=2, accumulation=1, gpu=True)
    assert twice.gradients - once.gradients == 4 * 500_000_000


def test_a_deepspeed_file_is_read_with_deepspeed_s_defaults(tmp_path):
    def read(name):
        return Zero.of(
            load_deepspeed(name, micro_batch=1, accumulation=1, world_size=2, clip_grad=0, precision="fp32")
        )

    bucket = 5 * 10**7
    assert read("zero0") == Zero(0) and read("zero1") == Zero(1, bucket)
    assert read("zero2") == Zero(2, bucket, overlap=True)
    offload = {"offload_optimizer": True, "offload_parameters": True}
    assert read("zero3_offload") == Zero(3, bucket, overlap=True, **offload)
    own = tmp_path / "own.json"
    own.write_text(
        '{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1e6, '
        '"stage3_prefetch_bucket_size": 7, "stage3_max_reuse_distance": 8}}'
    )
    assert read(str(own)) == Zero(3, reduce_bucket=10**6, overlap=True, prefetch=7, reuse_distance=8)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    defaults = DeepSpeedZeroConfig(stage=3)
    assert (Zero.reduce_bucket, Zero.prefetch, Zero.reuse_distance) == (
        defaults.reduce_bucket_size,
        defaults.prefetch_bucket_size,
        defaults.max_reuse_distance,
    )


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_model_states_are_those_of_deepspeed_s_estimators(ranks):
    """Compared without activations and buckets, which DeepSpeed doesn't count.

    Differences: DeepSpeed leaves out AdamW's temporaries (4 bytes a parameter), at whose time the 16-bit
      gradients that it
    counts (2) are free. At stage 3 it has 18 bytes, where weights 2, gradients 2 + 4, masters 4 and moments 8
    are 20. Its additional_buffer_factor concerns only the host, and is 1 here.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    n, layer, temporaries = 64_000_000, 1_000_000, 4
    trace = Trace(0, 0, (Gradient(layer, True, 0, 0),) * (n // layer))
    none = {"reduce_bucket": 0, "prefetch": 0, "reuse_distance": 0}

    def ours(stage, **more):
        return student_memory(
            trace, Zero(stage, **none, **more), PRECISIONS["bf16"], ranks=ranks, accumulation=1, gpu=True
        )

    _, second = estimate_zero2_model_states_mem_needs(n, num_gpus_per_node=ranks, cpu_offload=False)
    assert ours(2).total == second + (temporaries - 2) * n / ranks
    _, third, _ = estimate_zero3_model_states_mem_needs(
        n, layer, num_gpus_per_node=ranks, cpu_offload=False, cpu_offload_params=False
    )
    assert ours(3).total == third - 4 * layer + (temporaries + 2) * n / ranks
    _, offloaded, _ = estimate_zero3_model_states_mem_needs(
        n, layer, num_gpus_per_node=ranks, cpu_offload=True, cpu_offload_params=True
    )
    moved = ours(3, offload_optimizer=True, offload_parameters=True)
    # Its largest layer with its gradient, which is an activation here.
    assert moved.total == offloaded - 2 * layer
    host, _ = estimate_zero2_model_states_mem_needs(
        n, num_gpus_per_node=1, cpu_offload=True, additional_buffer_factor=1.0
    )
    assert student_memory(
        trace, Zero(2, offload_optimizer=True, **none), PRECISIONS["bf16"], ranks=1, accumulation=1, gpu=True
    ).host == pytest.approx(host, rel=0.15)
