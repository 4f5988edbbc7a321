"""Bytes of frozen teachers on a rank, and of the micro-batches that wait for their features. Pure numbers."""

from __future__ import annotations

from typing import Mapping, NamedTuple

from dmae_ds.plan.geometry import Geometry, TeacherGeometry
from dmae_ds.teacher.stages import held_blocks
from dmae_ds.teacher.stored import AHEAD


class Placement(NamedTuple):
    """Where a teacher's blocks are: `replicated`, `pipeline` in so many stages, or `zero3`."""

    name: str = "replicated"
    stages: int | None = None

    def __str__(self) -> str:
        return self.name if self.stages is None else f"{self.name} P={self.stages}"


Placed = Mapping[str, Placement]  # of every teacher by its name


def teacher_bytes(teacher: TeacherGeometry, placement: Placement, ranks: int) -> float:
    """Bytes of the teacher's weights on the rank that holds most.

    In zero3 it holds a share of all blocks, the one that runs and the next one (teacher/sharded.py).
    """
    if placement.name == "pipeline":
        shares = [
            sum(teacher.block_bytes[number] for number in blocks)
            for blocks in held_blocks(teacher.depth, placement.stages)
        ]
        return teacher.embedding_bytes + max(shares)
    if placement.name == "zero3":
        whole = min(2, teacher.depth) * max(teacher.block_bytes)
        return teacher.embedding_bytes + sum(teacher.block_bytes) / ranks + whole
    return teacher.weight_bytes


def stream_bytes(geometry: Geometry, placed: Placed) -> float:
    """Bytes of micro-batches and features that wait for the student: one, or a pipeline's queue and messages.

    A pipeline of P stages has 2P micro-batches in its queue. Every tick sends one buffer and has two to
    receive into, each with the tokens of at most P owners, the rank's own, and P - 1 features; the stage's P
    outputs are alive at the same time (teacher/pipeline.py, teacher/messages.py). Of several teachers each
    has its own queue, in which the features of those before it wait too (teacher/several.py). Stored
    features are read ahead.
    """
    total = known = geometry.batch_bytes
    for name, teacher in geometry.teachers.items():
        stages = placed[name].stages
        if not teacher.depth:
            total += AHEAD * known + (1 + AHEAD) * teacher.feature_bytes
        elif stages is None:
            total += teacher.feature_bytes
        else:
            total += pipeline_bytes(teacher, stages, known)
        known += teacher.feature_bytes
    return total


def pipeline_bytes(teacher: TeacherGeometry, stages: int, batch_bytes: float) -> float:
    """Bytes of a pipeline's queue and messages, beyond the micro-batch that the student takes.

    batch_bytes: of a micro-batch as it comes in
    """
    travelling = teacher.token_bytes + teacher.id_bytes
    message = max(
        sum(message_bytes(teacher, stages, source=s, target=t) for t in range(stages)) for s in range(stages)
    )
    received = max(
        sum(message_bytes(teacher, stages, source=s, target=t) for s in range(stages)) for t in range(stages)
    )
    return (
        2 * stages * batch_bytes
        + 2 * stages * teacher.feature_bytes
        + message
        + 2 * received
        + stages * travelling
    )


def message_bytes(teacher: TeacherGeometry, stages: int, *, source: int, target: int) -> int:
    """Bytes that stage `source` sends to stage `target` at a tick.

    Features are counted at the last stage, where most taps are.
    """
    batches = (target == 0) + stages * (target == source + 1)
    features = teacher.feature_bytes if source == stages - 1 else 0
    return batches * (teacher.token_bytes + teacher.id_bytes) + features
