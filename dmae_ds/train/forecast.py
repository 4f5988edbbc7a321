"""The planner at the start of a run: it chooses what the recipe leaves open, and predicts memory.

Left open are the micro-batch on GPUs (no `optim.micro_batch`) and `teacher.placement: auto`. The prediction
is in the summary; after the first steps it is compared with measured memory (peak_memory.py).
"""

from __future__ import annotations

import dataclasses

import psutil
import torch

from dmae_ds.config.batch import BatchSplit, smaller_split, whole_batch
from dmae_ds.config.run import RunConfig
from dmae_ds.distributed import collectives
from dmae_ds.errors import UserError
from dmae_ds.objectives.base import Objective
from dmae_ds.output.lines import say
from dmae_ds.output.units import GIB
from dmae_ds.plan.choose import HEADROOM, Candidate, candidates, choose
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import Geometry, measure, scaled
from dmae_ds.plan.memory import PARTS, Memory, Zero, rank_memory
from dmae_ds.plan.teacher_memory import Placement
from dmae_ds.train.cut import Cut, CutRecipe
from dmae_ds.train.peak_memory import PeakMemory
from dmae_ds.train.preflight import Preflight

AFTER_STEPS = 3  # by then Adam's moments exist and ZeRO-3 has learned in which order it needs the weights
MIN_PARAMETERS = 5_000_000  # below, memory belongs to libraries and not to tensors: nothing is predicted
SHOWN = 9  # placements of which the reason for a choice tells memory and time
# For the choice between placements on CPUs: a core's TFLOP/s and the share of it, gloo's Gbit/s between and
# inside nodes (guesses).
CPU = {
    "tflops": 0.2,
    "fp32_tflops": 0.2,
    "efficiency": 0.35,
    "band": (0.35,),
    "link_gbps": 10.0,
    "node_link_gbps": 20.0,
}


def has_large(objective: Objective) -> bool:
    """Whether a student, with its decoder and heads, is so large that its memory is predicted."""
    sizes = (
        sum(parameter.numel() for parameter in member.parameters()) for member in objective.members().values()
    )
    return max(sizes) >= MIN_PARAMETERS


def resolve_placement(preflight: Preflight, device: torch.device) -> tuple[Preflight, str]:
    """Replace the placements `auto` by the fastest that fit together; returns preflight and reason.

    The reason is "" where nothing was to be chosen. Collective: rank 0 decides for all, by the memory of
    the rank that has least. Raises UserError where nothing fits.
    """
    teachers = preflight.config.named_teachers()
    if all(teacher.placement != "auto" for teacher in teachers.values()):
        return preflight, ""
    free = min(collectives.gather_objects(free_bytes(device, preflight.world.local_size)))
    choice = collectives.raise_on_all_ranks(
        lambda: _choose(preflight, free, gpu=device.type == "cuda") if preflight.world.is_main else None
    )
    placed, reason = collectives.broadcast_from_main(choice)
    config = preflight.config.with_teachers(
        {
            name: teacher.model_copy(update={"placement": placed[name].name, "stages": placed[name].stages})
            for name, teacher in teachers.items()
        }
    )
    return dataclasses.replace(preflight, config=config), reason


def resolve_micro_batch(cut: Cut, device: torch.device, *, num_steps: int = 1) -> tuple[Cut, str]:
    """On GPUs, replace a missing `optim.micro_batch` by the largest that fits; returns the reason too.

    A run that resumes keeps what it began with. On CPUs, and where an objective needs its whole batch, a rank
    takes its whole share at once. The recipe of the run folder records the choice. Collective: rank 0 decides
    for all, by the memory of the rank that has least. Raises UserError where nothing fits.

    num_steps: number of different steps that share the device (bench step)
    """
    config = cut.config
    if device.type != "cuda" or config.optim.micro_batch or whole_batch(config) is not None:
        return cut, ""
    if cut.is_resumed:
        return cut.with_split(cut.split), ""
    free = min(collectives.gather_objects(free_bytes(device, cut.world.local_size))) / num_steps
    split = collectives.raise_on_all_ranks(lambda: largest_split(cut, free) if cut.world.is_main else None)
    cut = cut.with_split(collectives.broadcast_from_main(split))
    return cut, f"the largest micro-batch that the planner fits into {free / GIB:.1f} GiB a rank"


def largest_split(cut: CutRecipe, room: float) -> BatchSplit:
    """The first of training's own cut and its halves with which a rank's predicted memory is within `room`.

    Raises UserError where none is.
    """
    geometry, is_scaled = measure(cut.config, cut.micro_batch, device_type="cuda"), False
    while True:
        needed = least_bytes(cut, geometry)
        if needed <= room and not is_scaled:
            return cut.split
        if needed <= room:  # measured once more, because scaling is an estimate
            geometry, is_scaled = measure(cut.config, cut.micro_batch, device_type="cuda"), False
            continue
        smaller = smaller_split(cut.config, cut.world.size, cut.split)
        if smaller is None:
            raise UserError(
                f"nothing fits into {room / GIB:.1f} GiB a rank, down to optim.micro_batch="
                f"{cut.micro_batch} with {needed / GIB:.1f} GiB predicted; use more ranks, a higher "
                "ZeRO stage or student.checkpoint_blocks=true, or set optim.micro_batch to try it"
            )
        cut = cut.with_split(smaller)
        geometry, is_scaled = scaled(geometry, smaller.micro_batch), True


def least_bytes(cut: CutRecipe, geometry: Geometry) -> float:
    """Memory of a GPU with the teacher's placement, or with the one that needs least where it is auto."""
    if all(teacher.placement != "auto" for teacher in cut.config.named_teachers().values()):
        return predict(cut, geometry, gpu=True).total
    machine = _machine(cut, 1.0, gpu=True)
    return min(row.memory.total for row in _candidates(cut, geometry, machine, gpu=True, room=0))


def free_bytes(device: torch.device, local_ranks: int) -> float:
    """Bytes this rank may use: its GPU's free memory less the headroom, or its share of the node's RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * (1 - HEADROOM)
    return psutil.virtual_memory().available / local_ranks


def predict(cut: CutRecipe, geometry: Geometry, *, gpu: bool) -> Memory:
    """Memory that the planner expects a rank to need. No collective."""
    config = cut.config
    return rank_memory(
        geometry,
        Zero.of(cut.deepspeed),
        precision=config.precision,
        ranks=cut.world.size,
        accumulation=cut.accumulation,
        placed=given_placements(config),
        gpu=gpu,
    )


def given_placements(config: RunConfig) -> dict[str, Placement]:
    """Placements that the recipe gives, of the teachers whose placement is not auto."""
    return {
        name: Placement(teacher.placement, teacher.stages)
        for name, teacher in config.named_teachers().items()
        if teacher.placement != "auto"
    }


class MemoryReport:
    """Prints predicted and measured memory once a run has made its first steps.

    geometry: known on rank 0, which predicts and prints
    """

    def __init__(self, peak_memory: PeakMemory, preflight: Preflight, geometry: Geometry | None):
        self.peak_memory, self.num_steps = peak_memory, preflight.num_steps
        self.gpu = peak_memory.device.type == "cuda"
        self.predicted = None if geometry is None else predict(preflight, geometry, gpu=self.gpu)

    def after(self, step: int, *, started: int) -> None:
        """Print the report after the right step; call it after every one. Collective.

        started: the step at which the run began or resumed
        """
        if step != min(started + AFTER_STEPS, self.num_steps):
            return
        measured = max(collectives.gather_objects(self.peak_memory.peak()))
        if self.predicted is not None:
            say(compare(self.predicted, measured, gpu=self.gpu))


def compare(predicted: Memory, measured: int, *, gpu: bool) -> str:
    """One line: predicted memory with its parts, and measured memory."""
    names = counted_parts(gpu=gpu)
    total = sum(getattr(predicted, name) for name in names)
    part_texts = ", ".join(f"{name} {getattr(predicted, name) / GIB:.2f}" for name in names)
    return (
        f"memory    {total / GIB:.2f} GiB a rank predicted ({part_texts}), {measured / GIB:.2f} measured "
        f"on the rank that took most: {measured / total - 1:+.1%}"
    )


def counted_parts(*, gpu: bool) -> list[str]:
    """Names of the parts of predicted memory that PeakMemory counts: on a GPU, not those of libraries."""
    return [name for name in PARTS if not (gpu and name == "libraries")]


def _choose(preflight: Preflight, free: float, *, gpu: bool) -> tuple[dict[str, Placement], str]:
    """Choose the placements for a rank with `free` bytes; returns them and the reason."""
    world, config = preflight.world, preflight.config
    if world.size == 1:
        one = dict.fromkeys(config.named_teachers(), Placement()) | given_placements(config)
        return one, "replicated (chosen by auto: one rank)"
    geometry = measure(config, preflight.micro_batch, device_type="cuda" if gpu else "cpu")
    rows = _candidates(preflight, geometry, _machine(preflight, free, gpu=gpu), gpu=gpu, room=free)
    best = choose(rows, room=free)
    return dict(best.placed), _reason(best, rows, free)


def _machine(cut: CutRecipe, free: float, *, gpu: bool) -> Machine:
    world, rates = cut.world, {} if gpu else CPU
    return Machine(
        gpus=world.size,
        gpus_per_node=world.local_size,
        memory_gib=free / GIB,
        tf32=cut.config.tf32,
        **rates,
    )


def _candidates(
    cut: CutRecipe, geometry: Geometry, machine: Machine, *, gpu: bool, room: float
) -> list[Candidate]:
    """Every placement under the run's own DeepSpeed file."""
    return candidates(
        geometry,
        machine,
        {cut.config.deepspeed: Zero.of(cut.deepspeed)},
        precision=cut.config.precision,
        accumulation=cut.accumulation,
        gpu=gpu,
        room=room,
        fixed=given_placements(cut.config),
    )


def _reason(best: Candidate, rows: list[Candidate], free: float) -> str:
    others = []
    for row in rows[:SHOWN]:
        if row is not best:
            too_much = "" if row.fits else " (too much)"
            others.append(f"{row.name} {row.memory.total / GIB:.2f} GiB{too_much}, {row.cost.seconds:.3g} s")
    return (
        f"{best.name} (chosen by auto: the fastest that fits into {free / GIB:.2f} GiB a rank; "
        f"predicted {best.memory.total / GIB:.2f} GiB, {best.cost.seconds:.3g} s a step; {'; '.join(others)})"
    )
