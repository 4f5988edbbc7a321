"""Every placement of a teacher beside every way to shard a student: what fits, what is fastest. Pure numbers.

`dmae-ds plan` shows all of it; a recipe with `teacher.placement: auto` gets the fastest that fits (`choose`).
"""

from __future__ import annotations

from dataclasses import dataclass

from dmae_ds.errors import UserError
from dmae_ds.output.units import GIB
from dmae_ds.plan.cost import Cost, Machine, step_cost
from dmae_ds.plan.geometry import Geometry
from dmae_ds.plan.memory import PRECISIONS, Memory, Zero, rank_memory

EQUAL = 0.02  # seconds closer than this are equal: the guesses in cost.py are no better
HEADROOM = 0.05  # of a device's memory left to the allocator's fragmentation; a guess


@dataclass(frozen=True)
class Candidate:
    """A placement and a DeepSpeed file with what they need and cost."""

    placement: str
    stages: int | None
    deepspeed: str
    micro_batch: int
    memory: Memory
    cost: Cost
    fits: bool

    @property
    def name(self) -> str:
        return self.placement if self.stages is None else f"{self.placement} P={self.stages}"


def placements(geometry: Geometry, *, gpus: int, gpus_per_node: int) -> list[tuple[str, int | None]]:
    """(placement, stages): replicated first; pipelines of 2, 4, ... ranks that divide all; zero3 last.

    Powers of two up to a node's GPUs, and one that spans nodes. One rank: replicated.
    """
    if geometry.teacher is None:
        return [("no teacher", None)]
    if gpus == 1:
        return [("replicated", None)]
    powers = [2**power for power in range(1, gpus.bit_length())]
    largest = 2 * gpus_per_node
    lengths = [
        stages for stages in powers if gpus % stages == 0 and stages <= min(geometry.teacher.depth, largest)
    ]
    return [("replicated", None), *(("pipeline", stages) for stages in lengths), ("zero3", None)]


def candidates(
    geometry: Geometry,
    machine: Machine,
    zeros: dict[str, Zero],
    *,
    precision: str,
    accumulation: int,
    gpu: bool,
    room: float | None = None,
) -> list[Candidate]:
    """The whole table, in the order of `placements` and `zeros`. room: bytes a rank may use; default: memory_gib less headroom."""
    room = machine.memory_gib * GIB * (1 - HEADROOM) if room is None else room
    rows = []
    for placement, stages in placements(geometry, gpus=machine.gpus, gpus_per_node=machine.gpus_per_node):
        for name, zero in zeros.items():
            memory = rank_memory(
                geometry,
                zero,
                precision=precision,
                ranks=machine.gpus,
                accumulation=accumulation,
                placement=placement,
                stages=stages,
                gpu=gpu,
            )
            cost = step_cost(
                geometry,
                zero,
                PRECISIONS[precision],
                machine,
                accumulation=accumulation,
                placement=placement,
                stages=stages,
            )
            rows.append(
                Candidate(placement, stages, name, geometry.micro_batch, memory, cost, memory.total <= room)
            )
    return rows


def fastest(rows: list[Candidate]) -> Candidate | None:
    """The fastest that fits; of equals the first, so replicated before a pipeline before zero3, and the recipe's own DeepSpeed file."""
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    limit = min(row.cost.seconds for row in fitting) * (1 + EQUAL)
    return next(row for row in fitting if row.cost.seconds <= limit)


def choose(rows: list[Candidate], *, room: float) -> Candidate:
    """`fastest`, or a UserError that says what the smallest would need."""
    best = fastest(rows)
    if best is not None:
        return best
    least = min(rows, key=lambda row: row.memory.total)
    raise UserError(
        f"teacher.placement auto: nothing fits into {room / GIB:.1f} GiB a rank; the least is {least.name} under {least.deepspeed} with {least.memory.total / GIB:.1f} GiB "
        f"(teacher {least.memory.teacher / GIB:.1f}, activations {least.memory.activations / GIB:.1f}); set a smaller optim.micro_batch, use more ranks, or see dmae-ds plan"
    )
