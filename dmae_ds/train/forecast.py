"""The planner's word at the start of a run: where the teacher shall live (`teacher.placement: auto`), and how much memory it takes.

The planner's prediction stands in the summary; after the first steps it is held against what was measured (memory.py).
"""

from __future__ import annotations

import dataclasses
import sys

import psutil
import torch
from tqdm import tqdm

from dmae_ds.distributed import collectives
from dmae_ds.output.units import GIB
from dmae_ds.plan.choose import HEADROOM, Candidate, candidates, choose
from dmae_ds.plan.cost import Machine
from dmae_ds.plan.geometry import Geometry, measure
from dmae_ds.plan.memory import PARTS, Memory, Zero, rank_memory
from dmae_ds.train.peak_memory import PeakMemory
from dmae_ds.train.preflight import Preflight

AFTER_STEPS = 3  # by then Adam's moments exist and ZeRO-3 knows in which order it needs the weights
LEAST_PARAMETERS = 5_000_000  # below, libraries decide and not tensors: nothing is predicted
# For a CPU's choice between placements; guesses: a core's TFLOP/s, and gloo's Gbit/s between and inside nodes.
CPU = {"tflops": 0.2, "link_gbps": 10.0, "node_link_gbps": 20.0}


def resolve_placement(preflight: Preflight, device: torch.device) -> tuple[Preflight, str]:
    """The preflight with `auto` replaced by the fastest placement that fits, and the reason in one line ("" where nothing was asked).

    Collective: rank 0 decides for all, by the memory of the rank that has least. Raises UserError where nothing fits.
    """
    teacher = preflight.config.teacher
    if teacher is None or teacher.placement != "auto":
        return preflight, ""
    room = min(collectives.gather_objects(free_bytes(device, preflight.world.local_size)))
    found = collectives.raise_on_all_ranks(
        lambda: _choose(preflight, room, gpu=device.type == "cuda") if preflight.world.is_main else None
    )
    placement, stages, reason = collectives.broadcast_from_main(found)
    chosen = preflight.config.model_copy(
        update={"teacher": teacher.model_copy(update={"placement": placement, "stages": stages})}
    )
    return dataclasses.replace(preflight, config=chosen), reason


def free_bytes(device: torch.device, local_ranks: int) -> float:
    """What this rank may use: of its GPU's free memory all but the headroom, or its share of a node's available RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * (1 - HEADROOM)
    return psutil.virtual_memory().available / local_ranks


def predict(preflight: Preflight, geometry: Geometry, *, gpu: bool) -> Memory:
    """What the planner expects a rank to need. No collective."""
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
    """Prints predicted beside measured memory once a run has taken its first steps.

    geometry: known on rank 0, which predicts and prints
    """

    def __init__(self, watch: PeakMemory, preflight: Preflight, geometry: Geometry | None):
        self.watch, self.num_steps, self.gpu = watch, preflight.num_steps, watch.device.type == "cuda"
        self.predicted = None if geometry is None else predict(preflight, geometry, gpu=self.gpu)

    def after(self, step: int, *, started: int) -> None:
        """Told after every step; started: where the run began or resumed. Collective."""
        if step != min(started + AFTER_STEPS, self.num_steps):
            return
        measured = max(collectives.gather_objects(self.watch.peak()))
        if self.predicted is not None:
            tqdm.write(compare(self.predicted, measured, gpu=self.gpu), file=sys.stderr)


def compare(predicted: Memory, measured: int, *, gpu: bool) -> str:
    """One line: predicted, measured, and the parts. On a GPU what libraries take is outside torch's count, so outside both."""
    parts = [part for part in PARTS if not (gpu and part == "libraries")]
    total = sum(getattr(predicted, part) for part in parts)
    said = ", ".join(f"{part} {getattr(predicted, part) / GIB:.2f}" for part in parts)
    return f"memory    {total / GIB:.2f} GiB a rank predicted ({said}), {measured / GIB:.2f} measured on the rank that took most: {measured / total - 1:+.1%}"


def _choose(preflight: Preflight, room: float, *, gpu: bool) -> tuple[str, int | None, str]:
    world, config = preflight.world, preflight.config
    if world.size == 1:
        return "replicated", None, "replicated (chosen by auto: one rank)"
    geometry = measure(config, preflight.micro_batch)
    machine = Machine(
        gpus=world.size, gpus_per_node=world.local_size, memory_gib=room / GIB, **({} if gpu else CPU)
    )
    zeros = {config.deepspeed: Zero.of(preflight.deepspeed)}
    rows = candidates(
        geometry,
        machine,
        zeros,
        precision=config.precision,
        accumulation=preflight.accumulation,
        gpu=gpu,
        room=room,
    )
    best = choose(rows, room=room)
    return best.placement, best.stages, _reason(best, rows, room)


def _reason(best: Candidate, rows: list[Candidate], room: float) -> str:
    others = [
        f"{row.name} {row.memory.total / GIB:.2f} GiB{'' if row.fits else ' (too much)'}, {row.cost.seconds:.3g} s"
        for row in rows
        if row is not best
    ]
    return (
        f"{best.name} (chosen by auto: of what fits into {room / GIB:.2f} GiB a rank the fastest, equals in the table's order; predicted {best.memory.total / GIB:.2f} GiB, "
        f"{best.cost.seconds:.3g} s a step; {'; '.join(others)})"
    )
