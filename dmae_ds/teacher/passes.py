"""One teacher for a family of students: a pass for each group of them that shows it the same patches.

Students with the same mask share a pass and its features. A student with another mask must get the features
of its own patches, so it has a pass of its own, of its own taps alone. Which students share is decided from
what their objectives declare (objectives/family.py), never by comparing tensors.
"""

from __future__ import annotations

from typing import Iterable, Iterator, Sequence

from torch import Tensor, nn

from dmae_ds.models.masking import PatchBatch
from dmae_ds.teacher.frozen import FrozenTeacher
from dmae_ds.teacher.several import SeveralTeachers


def pass_tap(number: int, tap: str) -> str:
    """Name of a feature of a pass, counted from 0: those of the first one have the taps' own names."""
    return f"pass{number + 1}/{tap}" if number else tap


class TeacherPasses:
    """A teacher that runs once for each of `taps`, with the interface of one that runs once.

    A micro-batch has `passes`, a `PatchBatch` for each of them. A pipelined teacher has one stream for each,
    and they exchange one after the other on every tick, in the same order on every rank.
    """

    def __init__(self, teacher: FrozenTeacher | SeveralTeachers, taps: Sequence[tuple[str, ...]]):
        self.teacher = teacher
        self.passes = [teacher] if len(taps) == 1 else [teacher.with_taps(each) for each in taps]

    def __str__(self) -> str:
        times = len(self.passes)
        return str(self.teacher) if times == 1 else f"{self.teacher}, {times} passes an image"

    def networks(self) -> list[nn.Module]:
        """The networks whose blocks kernels may be chosen for."""
        return self.teacher.networks()

    def where(self) -> str:
        """The teacher's place in a run, for messages about a failure."""
        return self.teacher.where()

    def features(self, batch) -> dict[str, Tensor]:
        """Features of all passes, {tap: tensor}, those of later ones by `pass_tap`."""
        return {
            pass_tap(number, tap): feature
            for number, (teacher, patches) in enumerate(self.each(batch))
            for tap, feature in teacher.features(patches).items()
        }

    def each(self, batch) -> list[tuple[FrozenTeacher, PatchBatch]]:
        """The teacher with the taps of each pass, and the patches that it then sees."""
        return list(zip(self.passes, batch.passes, strict=True))

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        """Take (micro-batch, batch with passes) and yield both with the features of all passes, in order."""
        streams = ((source, batch, {}) for source, batch in batches)
        for number, teacher in enumerate(self.passes):
            streams = _added(number, teacher, streams)
        return iter(streams)


def _added(number: int, teacher: FrozenTeacher, batches: Iterable[tuple]) -> Iterator[tuple]:
    """Add the features of one pass to those of the passes before it."""
    packed = (((source, batch, before), batch.passes[number]) for source, batch, before in batches)
    for (source, batch, before), _, features in teacher.stream(packed):
        yield source, batch, before | {pass_tap(number, tap): value for tap, value in features.items()}
