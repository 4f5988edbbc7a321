"""Text of `dmae-ds plan`: the table of placements, the fastest that fits, and the command that starts it.

dmae-ds plan RECIPE [key=value] --gpus 16 --gpus-per-node 8 --gpu-memory-gib 80
"""

from __future__ import annotations

from dataclasses import replace

from dmae_ds.config.batch import whole_batch
from dmae_ds.config.family import student_names
from dmae_ds.config.run import RunConfig
from dmae_ds.data.order import num_steps
from dmae_ds.errors import UserError
from dmae_ds.output.table import text_table
from dmae_ds.output.units import GIB
from dmae_ds.plan.choose import EQUAL, HEADROOM, Candidate
from dmae_ds.plan.cost import (
    COLLECTIVE_S,
    HOOK_S,
    HOST_GB_S,
    LAUNCH_S,
    LINK_EFFICIENCY,
    Machine,
)
from dmae_ds.plan.fake_cuda import obstacle
from dmae_ds.plan.feeding import count_images, describe_feeding, describe_loading, describe_ranks
from dmae_ds.plan.geometry import Geometry
from dmae_ds.plan.measured import Measured
from dmae_ds.plan.memory import LIBRARIES_GPU, PARTS
from dmae_ds.plan.search import Plan, search
from dmae_ds.plan.stored import describe_stored

# Those of MAE: published images/s (106 of ViT-L, 313 of ViT-B, a GPU) by the FLOPs that are counted here.
PUBLISHED = (
    "published shares of the peak: MAE ViT-L on 64 V100 11%, ViT-B on 8 A6000 12%; ViT-5-S on one H100, "
    "compiled, 22.9%; ViT-g/14 on 8 H100 28.9%, on 8 A100 44.5% (NeMo); Llama 8B on H100 33-39% (torchtitan)"
)
FEW = 5  # rows that are shown without --all
_HEADS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activ.",
    "teacher": "teacher",
    "stream": "stream",
    "libraries": "libs",
}


def plan(
    config: RunConfig,
    machine: Machine,
    *,
    recipe: str,
    overrides: list[str],
    images: int | None,
    every_row: bool = False,
    measured: Measured | None = None,
) -> str:
    """Plan a recipe on a machine; returns the text. Neither weights nor shards nor a GPU are needed.

    recipe, overrides: as the user gave them, for the command
    images: images of an epoch; None: those of data.train where it is here, otherwise ImageNet-1k's
    every_row: show all candidates, by placement; otherwise the best ones, by what fits and is fast
    measured: where the machine's rates come from, if not from a data sheet
    Raises UserError where training would, and for impossible machines.
    """
    check_machine(machine)
    machine = replace(machine, tf32=config.tf32)
    epoch = count_images(config.data, images)
    if measured is not None:
        measured.check(config)
    result = search(config, machine)
    micro_batch, accumulation = result.split
    steps = num_steps(config.optim.epochs, epoch.number, config.optim.global_batch)
    warning = config.teacher_warning()
    lines = [
        f"{recipe} on {machine.gpus} GPUs of {machine.memory_gib:g} GiB, {machine.gpus_per_node} a node; "
        "predicted; never measured on a GPU",
        *_describe(config, result.geometry, accumulation=accumulation),
        f"data: {epoch.number:,} images ({epoch.source}); {steps:,} steps of {config.optim.global_batch} = "
        f"{machine.gpus} x {micro_batch} x {accumulation} accumulated",
        describe_ranks(config, machine),
        *([] if measured is None else [measured.describe()]),
        *([f"WARNING: {warning}"] if warning else []),
        "",
    ]
    rows = result.rows if every_row else best_rows(result)
    lines += [*_table(rows, config, steps=steps, gpus=machine.gpus)]
    if len(rows) < len(result.rows):
        lines.append(f"({len(rows)} of {len(result.rows)} candidates; --all shows all)")
    lines.append("")
    lines += _verdict(config, machine, result, recipe=recipe, overrides=overrides)
    if result.best is not None:
        lines += ["", *_speed(config, machine, result.best, steps=steps)]
        lines += describe_feeding(config, machine, result.best, epoch)
        lines += describe_loading(config, machine, result.geometry.teachers)
        lines += describe_stored(config, machine, result, steps=steps)
    lines += ["", _assumptions(machine)]
    return "\n".join(lines)


def best_rows(result: Plan) -> list[Candidate]:
    """The fastest that fits, then others that fit by seconds, then those that need least memory."""

    def rank(row: Candidate) -> tuple:
        return row is not result.best, not row.fits, row.ranked_s if row.fits else row.memory.total

    return sorted(result.rows, key=rank)[:FEW]


def _verdict(
    config: RunConfig, machine: Machine, result: Plan, *, recipe: str, overrides: list[str]
) -> list[str]:
    """Lines that name the fastest and its command; where nothing fits, the least memory that is needed."""
    first, micro_batch, best = result.first.micro_batch, result.split.micro_batch, result.best
    if best is None:
        least = min(result.rows, key=lambda row: row.memory.total)
        lines = [
            f"nothing fits, down to optim.micro_batch={micro_batch}: the least is {least.name} with "
            f"{least.deepspeed}, "
            f"{least.memory.total / GIB:.1f} GiB a rank"
        ]
        whole = whole_batch(config)
        if whole is not None:
            lines.append(
                f"objective {whole} compares all images of a batch, so it takes no smaller "
                "micro-batch; "
                "use more GPUs, or a smaller optim.global_batch"
            )
        return lines
    lines = []
    if result.is_smaller:
        lines.append(
            f"nothing fits with optim.micro_batch={first}; {micro_batch} is the largest that does, of those "
            "tried by halving"
        )
    lines.append(
        f"fastest that fits: {best.name}, {best.deepspeed}; {best.memory.total / GIB:.1f} GiB a rank, "
        f"{best.cost.seconds:.3g} s a step"
    )
    start = command(
        best,
        machine,
        recipe=recipe,
        overrides=overrides,
        sections={name: teacher.section for name, teacher in config.named_teachers().items()},
        micro_batch=micro_batch if result.is_smaller else None,
    )
    return [*lines, start]


def _speed(config: RunConfig, machine: Machine, best: Candidate, *, steps: int) -> list[str]:
    """Seconds of the fastest at each share of the peak, and published shares."""
    shares = " / ".join(f"{share:.0%}" for share in machine.band)
    seconds = " / ".join(f"{value:.3g}" for value in best.band)
    rates = " / ".join(f"{config.optim.global_batch / value:,.0f}" for value in best.band)
    hours = " / ".join(f"{steps * value / 3600:,.3g}" for value in best.band)
    gpu_hours = " / ".join(f"{steps * value * machine.gpus / 3600:,.0f}" for value in best.band)
    line = (
        f"at {shares} of the peak rates: {seconds} s a step, {rates} images/s, {hours} hours, "
        f"{gpu_hours} GPU h"
    )
    return [line] if len(machine.band) == 1 else [line, PUBLISHED]


def check_machine(machine: Machine) -> None:
    """Raise UserError for numbers that no machine can have."""
    numbers = {
        "--gpus": machine.gpus,
        "--gpus-per-node": machine.gpus_per_node,
        "--gpu-memory-gib": machine.memory_gib,
        "--tflops": machine.tflops,
        "--fp32-tflops": machine.tflops if machine.fp32_tflops is None else machine.fp32_tflops,
        "--worker-images-s": machine.worker_images_s,
        "--storage-gb-s": machine.storage_gb_s,
        "--efficiency": machine.efficiency,
        "--link-gbps": machine.link_gbps,
        "--node-link-gbps": machine.node_link_gbps,
    }
    for name, value in numbers.items():
        if value <= 0:
            raise UserError(f"{name} is {value:g}; give a number above 0")
    if machine.efficiency > 1:
        raise UserError(f"--efficiency is {machine.efficiency:g}; give a share of the peak rates, at most 1")
    if machine.gpus % machine.gpus_per_node:
        raise UserError(
            f"--gpus {machine.gpus} is not a multiple of --gpus-per-node {machine.gpus_per_node}; "
            "give a multiple, since all nodes have the same number"
        )


def command(
    best: Candidate,
    machine: Machine,
    *,
    recipe: str,
    overrides: list[str],
    sections: dict[str, str],
    micro_batch: int | None,
) -> str:
    """Command that starts a candidate: one node by its number of GPUs, several by a hostfile.

    sections: of the teachers in the recipe, by name
    """
    chosen: dict[str, object] = {}
    for name, section in sections.items():
        chosen[f"{section}.placement"] = best.placed[name].name
        if best.placed[name].stages:
            chosen[f"{section}.stages"] = best.placed[name].stages
    chosen["deepspeed"] = best.deepspeed
    if micro_batch:
        chosen["optim.micro_batch"] = micro_batch
    replaced = {*chosen, *(f"{section}.stages" for section in sections.values())}
    kept = [override for override in overrides if override.partition("=")[0] not in replaced]
    where = f"--num_gpus {machine.gpus}" if machine.gpus == machine.gpus_per_node else "--hostfile hostfile"
    settings = [f"{key}={value}" for key, value in chosen.items()]
    return " ".join(["deepspeed -q", where, "--module dmae_ds train", recipe, *kept, *settings])


def _describe(config: RunConfig, geometry: Geometry, *, accumulation: int) -> list[str]:
    student = geometry.student
    tera = accumulation / 1e12
    work = f"student forward {student.forward_flops * tera:.3g}, backward {student.backward_flops * tera:.3g}"
    lines = [
        f"student: {student_names(config)}, {geometry.student_parameters / 1e6:.1f} M; "
        f"with decoder and heads {student.parameters / 1e6:.1f} M, {config.precision}",
        *describe_members(geometry),
    ]
    place = len(lines)
    for name, teacher in reversed(geometry.teachers.items()):
        section = config.named_teachers()[name]
        if not teacher.depth:
            lines.insert(place, f"{section.section}: {section.name}, no network: its features are read")
            continue
        lines.insert(
            place,
            f"{section.section}: {section.name}, {teacher.depth} blocks, "
            f"{teacher.weight_bytes / GIB:.2f} GiB in {section.dtype}",
        )
        work = f"{f'teacher {name}'.strip()} {teacher.flops * tera:.3g}, {work}"
    lines.append(f"TFLOP a step and rank: {work}")
    if geometry.device_type == "cpu":
        lines.append(
            f"traced with a CPU's kernels, for torch cannot fake CUDA here ({obstacle()}): activations "
            "may differ; use a newer torch"
        )
    return lines


def describe_members(geometry: Geometry) -> list[str]:
    """What each student of a family costs beside the others, and what they cost alone; [] of one student."""
    if len(geometry.members) < 2:
        return []
    of_each = [teacher.pass_flops for teacher in geometry.teachers.values()]
    passes = [sum(flops) for flops in zip(*of_each, strict=True)]
    lines, seen, together, separate = [], set(), 0, 0
    for number, (name, trace) in enumerate(geometry.members.items(), start=1):
        trained = trace.forward_flops + trace.backward_flops
        one = geometry.pass_of.get(name)
        of_teacher = 0 if one is None else passes[one]
        added = trained + (0 if one in seen else of_teacher)
        seen.add(one)
        together, separate = together + added, separate + trained + of_teacher
        pass_text = "no teacher" if one is None else f"the teacher's pass {one + 1} of {len(passes)}"
        lines.append(
            f"  {name}: {trace.parameters / 1e6:.1f} M trained, {pass_text}, adds {added / 1e12:.3g} TFLOP a "
            f"micro-batch, alone {(trained + of_teacher) / 1e12:.3g}; activations "
            f"{trace.activations / GIB:.2f} GiB in its turn; {number} together: "
            f"{together / separate:.2f} of the work of separate runs"
        )
    return lines


def _table(rows: list[Candidate], config: RunConfig, *, steps: int, gpus: int) -> list[str]:
    memory_heads = [*(_HEADS[part] for part in PARTS), "GiB", "host", "fits"]
    cost_heads = ["in node", "between", "s/step", "images/s", "hours", "GPU h"]
    cells = [["placement", "deepspeed", *memory_heads, *cost_heads]]
    for row in rows:
        memory, cost = row.memory, row.cost
        cells.append(
            [
                row.name,
                row.deepspeed,
                *(f"{getattr(memory, part) / GIB:.2f}" for part in PARTS),
                f"{memory.total / GIB:.2f}",
                f"{memory.host / GIB:.2f}",
                "yes" if row.fits else "no",
                f"{cost.traffic.inside / 1e9:.2f}",
                f"{cost.traffic.between / 1e9:.2f}",
                f"{cost.seconds:.3f}",
                f"{config.optim.global_batch / cost.seconds:,.0f}",
                f"{steps * cost.seconds / 3600:,.3g}",
                f"{steps * cost.seconds * gpus / 3600:,.0f}",
            ]
        )
    return text_table(cells, left=(0, 1))


def _assumptions(machine: Machine) -> str:
    sentences = [
        f"GiB a rank, of which {HEADROOM:.0%} of the device stay free; seconds within {EQUAL:.0%} count as "
        f"equal and the simpler placement wins, at {machine.band[-1]:.0%} of the peak; GB sent a step by the "
        "busiest rank inside its node, and by the busiest node to others.",
        f"Guesses: {machine.efficiency:.0%} of {machine.tflops:g} TFLOP/s in bf16 and of "
        f"{machine.peak('fp32'):g} in fp32, {LAUNCH_S * 1e6:g} us of the host a kernel, "
        f"{HOOK_S * 1e6:g} us a module and pass under ZeRO-3, {COLLECTIVE_S * 1e6:g} us a collective, "
        f"{LINK_EFFICIENCY:.0%} of "
        f"{machine.node_link_gbps:g} Gbit/s a GPU inside a node and of {machine.link_gbps:g} Gbit/s a node "
        "between, "
        f"{machine.device_gb_s:,.0f} GB/s of device memory for AdamW, {HOST_GB_S:g} GB/s a rank for "
        f"offloading, {LIBRARIES_GPU / GIB:g} GiB for CUDA and NCCL.",
        "Overlap is assumed: stream with the stage's work, ZeRO-3 gathers with their pass, reductions with "
        "backward where overlap_comm is set, up to the last bucket.",
    ]
    return " ".join(sentences)
