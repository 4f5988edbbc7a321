"""Memory of the first and of later passes of a step, by hand on a network of three tensors."""

from __future__ import annotations

import pytest

from dmae_ds.plan.memory import PRECISIONS, Zero, student_memory
from dmae_ds.plan.trace import Gradient, Trace

# 60 parameters. Activations fall from 1000 to 900 bytes while the gradients come, the last 30 numbers of all.
TRACE = Trace(0, 0, (Gradient(10, True, 1000, 700), Gradient(20, True, 800, 700), Gradient(30, True, 900, 0)))
NONE = {"reduce_bucket": 0, "prefetch": 0, "reuse_distance": 0}
FP32_STATES = 60 * (4 + 8)  # weights and moments, without ZeRO no copy of the weights


def worst(zero, precision, *, ranks, accumulation):
    memory = student_memory(
        TRACE, zero, PRECISIONS[precision], ranks=ranks, accumulation=accumulation, gpu=True
    )
    return memory.total


@pytest.mark.parametrize(
    ("zero", "precision", "ranks", "first", "later"),
    [
        # the last gradient but one exists beside 900 bytes; in a later pass all of them from its start
        (Zero(0), "fp32", 1, FP32_STATES + 900 + 4 * 30, FP32_STATES + 1000 + 4 * 60),
        (Zero(0), "bf16", 1, 60 * (2 + 4 + 8) + 1000, 60 * (2 + 4 + 8) + 1000 + 2 * 60),
        (Zero(1, **NONE), "fp32", 2, 60 * 4 + 30 * 12 + 900 + 4 * 30, 60 * 4 + 30 * 12 + 1000 + 4 * 60),
        # a rank's half of the gradients waits for the next pass
        (Zero(2, **NONE), "fp32", 2, 60 * 4 + 30 * 12 + 1000, 60 * 4 + 30 * 12 + 1000 + 4 * 30),
        (Zero(1, overlap=True, **NONE), "bf16", 2, 60 * 2 + 30 * 12 + 1000, 60 * 2 + 30 * 12 + 1000 + 2 * 30),
        (Zero(2, offload_optimizer=True, **NONE), "fp32", 2, 60 * 4 + 1000, 60 * 4 + 1000),
        # its half stays from step to step; the tensor that is computed with is gathered
        (Zero(3, **NONE), "fp32", 2, 30 * (4 + 4 + 12) + 1000 + 4 * 10, 30 * (4 + 4 + 12) + 1000 + 4 * 10),
    ],
    ids=str,
)
def test_the_worst_moment_of_the_first_and_of_later_passes(zero, precision, ranks, first, later):
    assert worst(zero, precision, ranks=ranks, accumulation=1) == first
    assert worst(zero, precision, ranks=ranks, accumulation=2) == later
    assert worst(zero, precision, ranks=ranks, accumulation=7) == later


@pytest.mark.parametrize(
    ("reuse_distance", "prefetch", "gathered"),
    [
        (0, 0, [10, 20, 30]),  # the tensor alone
        (0, 15, [15, 20, 30]),  # or what is prefetched, where that is more
        (30, 15, [30, 30, 30]),
        (80, 15, [55, 50, 30]),  # never more than is left
    ],
)
@pytest.mark.parametrize("moment", range(3))
def test_weights_that_are_gathered_in_backward(reuse_distance, prefetch, gathered, moment):
    """Activations make each gradient's moment the worst in turn."""
    sizes, before = (10, 20, 30), [1000 if place == moment else 0 for place in range(3)]
    gradients = tuple(Gradient(size, True, peak, 0) for size, peak in zip(sizes, before, strict=True))
    zero = Zero(3, reduce_bucket=0, prefetch=prefetch, reuse_distance=reuse_distance)
    memory = student_memory(
        Trace(0, 0, gradients), zero, PRECISIONS["fp32"], ranks=2, accumulation=1, gpu=True
    )
    assert memory.activations == 1000 and memory.parameters == 4 * 30 + 4 * gathered[moment]


def test_two_copies_of_the_reduced_part_exist_where_passes_are_added():
    """With 50 gradients in a bucket; activations are nothing, so the last bucket is the worst moment."""
    light = Trace(0, 0, (Gradient(60, True, 0, 0),))
    # The bucket's flat copy next to a sixth of this rank's half, of the bucket before; or two of the half.
    for accumulation, part in ((1, 4 * 50 + 4 * 30 / 6), (2, 2 * 4 * 30)):
        memory = student_memory(
            light,
            Zero(2, reduce_bucket=50),
            PRECISIONS["fp32"],
            ranks=2,
            accumulation=accumulation,
            gpu=True,
        )
        assert memory.gradients == pytest.approx(4 * 50 + part)
