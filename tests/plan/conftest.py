"""Geometries by hand, in round numbers, so that expected bytes are easy to compute."""

from __future__ import annotations

import pytest

from dmae_ds.plan.geometry import Geometry, TeacherGeometry
from dmae_ds.plan.trace import Gradient, Trace


def geometry_of(
    *,
    parameters: int = 80_000_000,
    layers: int = 20,
    activations: int = 10**9,
    blocks: int = 18,
    block_bytes: int = 10**8,
) -> Geometry:
    """A student of equal layers whose activations shrink evenly in backward; a teacher of equal blocks."""
    sizes = [parameters // layers] * layers
    left = [activations * (layers - layer) // layers for layer in range(layers + 1)]
    trace = Trace(
        10**12,
        2 * 10**12,
        tuple(
            Gradient(size, True, before, after)
            for size, before, after in zip(sizes, left, left[1:], strict=False)
        ),
    )
    teacher = TeacherGeometry(
        embedding_bytes=10**7,
        block_bytes=(block_bytes,) * blocks,
        flops=10**12,
        working_bytes=10**8,
        token_bytes=4 * 10**6,
        id_bytes=10**4,
        feature_bytes=4 * 10**6,
    )
    return Geometry(
        micro_batch=16,
        student=trace,
        student_parameters=parameters,
        buffer_bytes=0,
        batch_bytes=10**7,
        teachers={"": teacher},
    )


@pytest.fixture
def geometry() -> Geometry:
    return geometry_of()
