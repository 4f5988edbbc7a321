"""Memory and time of every placement of a teacher with every sharding of a student. Pure numbers.

`dmae-ds plan` shows all of them; a recipe with `teacher.placement: auto` gets the fastest that fits
(`choose`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from dmae_ds.errors import UserError
from dmae_ds.output.units import GIB
from dmae_ds.plan.cost import Cost, Machine, step_cost
from dmae_ds.plan.geometry import Geometry, TeacherGeometry
from dmae_ds.plan.memory import PRECISIONS, Memory, Zero, rank_memory
from dmae_ds.plan.teacher_memory import Placed, Placement

EQUAL = 0.1  # relative difference of seconds that count as equal: the guesses in cost.py are no better
HEADROOM = 0.05  # share of a device's memory left for the allocator's fragmentation; a guess


@dataclass(frozen=True)
class Candidate:
    """Placements of all teachers with a DeepSpeed file, the memory they need and the time they take."""

    placed: Placed
    deepspeed: str
    micro_batch: int
    memory: Memory
    cost: Cost
    band: tuple[float, ...]  # seconds of a step at the shares of the machine's band
    fits: bool

    @property
    def ranked_s(self) -> float:
        """Seconds by which candidates are compared: at the highest share, where links and host limit most.

        At a low share slow products hide them, and ZeRO-3 would be chosen for 12% that 45% turns into a loss
        of a third.
        """
        return self.band[-1]

    @property
    def name(self) -> str:
        texts = [f"{name} {placement}".strip() for name, placement in self.placed.items()]
        return ", ".join(texts) or "no teacher"


def combinations(
    geometry: Geometry, *, gpus: int, gpus_per_node: int, fixed: Placed | None = None
) -> list[Placed]:
    """List placements of all teachers together, in order of preference.

    fixed: of teachers that are not to be placed otherwise
    """
    each = {
        name: [fixed[name]]
        if fixed and name in fixed
        else placements(teacher, gpus=gpus, gpus_per_node=gpus_per_node)
        for name, teacher in geometry.teachers.items()
    }
    return [dict(zip(each, chosen, strict=True)) for chosen in product(*each.values())]


def placements(teacher: TeacherGeometry, *, gpus: int, gpus_per_node: int) -> list[Placement]:
    """List a teacher's placements by preference: replicated, pipelines of 2, 4, ... stages, zero3.

    Numbers of stages divide the GPUs and are powers of two, up to a node's GPUs and one that spans two nodes.
    On one GPU there is only replicated, and a teacher without blocks has its features stored.
    """
    if not teacher.depth:
        return [Placement("cache")]
    if gpus == 1:
        return [Placement()]
    powers = [2**power for power in range(1, gpus.bit_length())]
    largest = 2 * gpus_per_node
    lengths = [stages for stages in powers if gpus % stages == 0 and stages <= min(teacher.depth, largest)]
    pipelines = [Placement("pipeline", stages) for stages in lengths]
    return [Placement(), *pipelines, Placement("zero3")]


def candidates(
    geometry: Geometry,
    machine: Machine,
    zeros: dict[str, Zero],
    *,
    precision: str,
    accumulation: int,
    gpu: bool,
    room: float | None = None,
    fixed: Placed | None = None,
) -> list[Candidate]:
    """Compute the whole table, in the order of `combinations` and `zeros`.

    fixed: of teachers that are not to be placed otherwise
    room: bytes that a rank may use; None: the machine's memory_gib less HEADROOM
    """
    room = machine.memory_gib * GIB * (1 - HEADROOM) if room is None else room
    rows = []
    for placed in combinations(geometry, gpus=machine.gpus, gpus_per_node=machine.gpus_per_node, fixed=fixed):
        for name, zero in zeros.items():
            memory = rank_memory(
                geometry,
                zero,
                precision=precision,
                ranks=machine.gpus,
                accumulation=accumulation,
                placed=placed,
                gpu=gpu,
            )
            costs = {
                efficiency: step_cost(
                    geometry,
                    zero,
                    PRECISIONS[precision],
                    machine,
                    accumulation=accumulation,
                    placed=placed,
                    efficiency=efficiency,
                )
                for efficiency in (machine.efficiency, *machine.band)
            }
            rows.append(
                Candidate(
                    placed,
                    name,
                    geometry.micro_batch,
                    memory,
                    costs[machine.efficiency],
                    tuple(costs[share].seconds for share in machine.band),
                    memory.total <= room,
                )
            )
    return rows


def fastest(rows: list[Candidate]) -> Candidate | None:
    """The fastest candidate that fits; None where none does.

    Among equals it is the first in the table: replicated before a pipeline before zero3, the recipe's own
    DeepSpeed file before the shipped ones.
    """
    fitting = [row for row in rows if row.fits]
    if not fitting:
        return None
    limit = min(row.ranked_s for row in fitting) * (1 + EQUAL)
    return next(row for row in fitting if row.ranked_s <= limit)


def choose(rows: list[Candidate], *, room: float) -> Candidate:
    """The fastest candidate that fits. Raises UserError with the needs of the smallest where none does."""
    best = fastest(rows)
    if best is not None:
        return best
    least = min(rows, key=lambda row: row.memory.total)
    memory = least.memory
    raise UserError(
        f"teacher.placement auto: nothing fits into {room / GIB:.1f} GiB a rank; the least is {least.name} "
        "under "
        f"{least.deepspeed} with {memory.total / GIB:.1f} GiB (teacher {memory.teacher / GIB:.1f}, "
        "activations "
        f"{memory.activations / GIB:.1f}); set a smaller optim.micro_batch, use more ranks, or see dmae-ds "
        "plan"
    )
