"""The planner at the start of a run: it places the teacher (`teacher.placement: auto`) and predicts memory.

The prediction is in the summary; after the first steps it is compared with measured memory (peak_memory.py).
"""

from __future__ import annotations

import dataclasses

import psutil
import torch

from dmae_ds.distributed import collectives
from dmae_ds.output.lines import say
from dmae_ds.output.units import GIB
from dmae_ds.plan.choose import HEADROOM, Candidate, candidates, choose
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import Geometry, measure
from dmae_ds.plan.memory import PARTS, Memory, Zero, rank_memory
from dmae_ds.train.peak_memory import PeakMemory
from dmae_ds.train.preflight import Preflight

AFTER_STEPS = 3  # by then Adam's moments exist and ZeRO-3 has learned in which order it needs the weights
MIN_PARAMETERS = 5_000_000  # below, memory belongs to libraries and not to tensors: nothing is predicted
# For the choice between placements on CPUs: a core's TFLOP/s, gloo's Gbit/s between and inside nodes
# (guesses).
CPU = {"tflops": 0.2, "link_gbps": 10.0, "node_link_gbps": 20.0}


def resolve_placement(preflight: Preflight, device: torch.device) -> tuple[Preflight, str]:
    """Replace the placement `auto` by the fastest one that fits; returns the preflight and the reason.

    The reason is "" where nothing was to be chosen. Collective: rank 0 decides for all, by the memory of
    the rank that has least. Raises UserError where nothing fits.
    """
    teacher = preflight.config.teacher
    if teacher is None or teacher.placement != "auto":
        return preflight, ""
    free = min(collectives.gather_objects(free_bytes(device, preflight.world.local_size)))
    choice = collectives.raise_on_all_ranks(
        lambda: _choose(preflight, free, gpu=device.type == "cuda") if preflight.world.is_main else None
    )
    placement, stages, reason = collectives.broadcast_from_main(choice)
    placed = teacher.model_copy(update={"placement": placement, "stages": stages})
    config = preflight.config.model_copy(update={"teacher": placed})
    return dataclasses.replace(preflight, config=config), reason


def free_bytes(device: torch.device, local_ranks: int) -> float:
    """Bytes this rank may use: its GPU's free memory less the headroom, or its share of the node's RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * (1 - HEADROOM)
    return psutil.virtual_memory().available / local_ranks


def predict(preflight: Preflight, geometry: Geometry, *, gpu: bool) -> Memory:
    """Memory that the planner expects a rank to need. No collective."""
    config, teacher = preflight.config, preflight.config.teacher
    return rank_memory(
        geometry,
        Zero.of(preflight.deepspeed),
        precision=config.precision,
        ranks=preflight.world.size,
        accumulation=preflight.accumulation,
        placement="replicated" if teacher is None else teacher.placement,
        stages=None if teacher is None else teacher.stages,
        gpu=gpu,
    )


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


def _choose(preflight: Preflight, free: float, *, gpu: bool) -> tuple[str, int | None, str]:
    """Choose (placement, stages, reason) for a rank with `free` bytes."""
    world, config = preflight.world, preflight.config
    if world.size == 1:
        return "replicated", None, "replicated (chosen by auto: one rank)"
    geometry = measure(config, preflight.micro_batch)
    rates = {} if gpu else CPU
    machine = Machine(gpus=world.size, gpus_per_node=world.local_size, memory_gib=free / GIB, **rates)
    rows = candidates(
        geometry,
        machine,
        {config.deepspeed: Zero.of(preflight.deepspeed)},
        precision=config.precision,
        accumulation=preflight.accumulation,
        gpu=gpu,
        room=free,
    )
    best = choose(rows, room=free)
    return best.placement, best.stages, _reason(best, rows, free)


def _reason(best: Candidate, rows: list[Candidate], free: float) -> str:
    others = []
    for row in rows:
        if row is not best:
            too_much = "" if row.fits else " (too much)"
            others.append(f"{row.name} {row.memory.total / GIB:.2f} GiB{too_much}, {row.cost.seconds:.3g} s")
    return (
        f"{best.name} (chosen by auto: the fastest that fits into {free / GIB:.2f} GiB a rank; "
        f"predicted {best.memory.total / GIB:.2f} GiB, {best.cost.seconds:.3g} s a step; {'; '.join(others)})"
    )
