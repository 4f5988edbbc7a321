"""Several frozen teachers as one: each has its own network, placement and statistics; their streams chain.

Every teacher's stream takes batches in and gives the oldest one out with its features. So a chain of them is
the whole mechanism: the next teacher gets what the one before gives out, and features by then known travel
with the batch. A teacher that runs ahead makes those before it run ahead too: two of P and Q stages hold 2P +
2Q micro-batches. Each teacher computes what it would alone, bit for bit.

Order of collectives, for whoever extends this. From one host thread a rank takes a tick of each teacher's
stream in the order of their names, which is the same on every rank (RunConfig.named_teachers), then the
student's step. A tick waits for its exchange before it ends (pipeline.py), and a block that is fetched is
waited for before it runs (sharded.py): so at no moment are two teachers' collectives in flight, and no rank
can issue them in another order, also while the chain fills and empties, which depends on the number of
batches alone, the same on every rank. On NCCL the wait is an event on the compute stream, behind which the
next teacher's exchange is queued: whatever the groups' communicators are, their kernels run one after the
other, in one order. Teachers with equally many stages share a group (train/networks.py).
"""

from __future__ import annotations

from typing import Iterable, Iterator

from torch import Tensor, nn

from dmae_ds.config.teachers import taps_of, with_name
from dmae_ds.models.masking import PatchBatch
from dmae_ds.teacher.frozen import FrozenTeacher


class SeveralTeachers:
    """Teachers by name, with the stream of one; their taps are "dino:block/18".

    teachers: in the same order on every rank
    """

    def __init__(self, teachers: dict[str, FrozenTeacher]):
        self.teachers = teachers

    def __str__(self) -> str:
        return "; ".join(f"{name}: {teacher}" for name, teacher in self.teachers.items())

    def with_taps(self, taps: tuple[str, ...]) -> SeveralTeachers:
        """The teachers of some of the taps, each for its own alone (passes.py)."""
        of_each = {name: taps_of(name, taps) for name in self.teachers}
        return SeveralTeachers(
            {name: self.teachers[name].with_taps(mine) for name, mine in of_each.items() if mine}
        )

    def networks(self) -> list[nn.Module]:
        """The networks whose blocks kernels may be chosen for."""
        return [network for teacher in self.teachers.values() for network in teacher.networks()]

    def where(self) -> str:
        """Places of the teachers that are pipelined, for messages about a failure; empty without one."""
        places = {name: teacher.where() for name, teacher in self.teachers.items()}
        return "; ".join(f"{name}: {place}" for name, place in places.items() if place)

    def features(self, batch: PatchBatch) -> dict[str, Tensor]:
        """Features of all teachers by tap, where none is pipelined; shapes as of `FrozenTeacher.features`."""
        return {
            with_name(name, tap): tokens
            for name, teacher in self.teachers.items()
            for tap, tokens in teacher.features(batch).items()
        }

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        """Take (micro-batch, masked batch) and yield both with the features of all teachers, in order.

        Collective as the teachers' own streams are.
        """
        chained = ((source, masked, {}) for source, masked in batches)
        for name, teacher in self.teachers.items():
            chained = _add_features(chained, name, teacher)
        yield from chained


def _add_features(batches: Iterator[tuple], name: str, teacher: FrozenTeacher) -> Iterator[tuple]:
    """Add a teacher's features to those that come with each (micro-batch, masked batch, features)."""
    carried = (((source, known), masked) for source, masked, known in batches)
    for (source, known), masked, features in teacher.stream(carried):
        yield source, masked, known | {with_name(name, tap): tokens for tap, tokens in features.items()}
