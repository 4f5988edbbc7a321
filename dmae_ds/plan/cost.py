"""Seconds of a step, from FLOPs and bytes over links. Pure numbers; what is a guess says so.

Nothing here was measured on a GPU. The guesses are constants below, and the two that matter most are arguments:
the peak rate of a device (`tflops`) and the links.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmae_ds.plan.geometry import Geometry, TeacherGeometry
from dmae_ds.plan.memory import ADAM, MASTER, Precision, Zero, message_bytes

EFFICIENCY = 0.4  # achieved share of `tflops`; a guess: what ViTs of width 768-1280 usually reach in bf16
LINK_EFFICIENCY = 0.7  # achieved share of a link's rate; a guess
DEVICE_GB_S = 1500.0  # memory rate of a GPU, for AdamW, which is bound by it; a guess
HOST_GB_S = 20.0  # a rank's share of PCIe and of the host's memory, for offloading; a guess


@dataclass(frozen=True)
class Machine:
    """What is at hand. Rates are peaks: TFLOP/s of a device, Gbit/s of a node's way out, Gbit/s of a device's way inside."""

    gpus: int
    gpus_per_node: int
    memory_gib: float
    tflops: float = 300.0
    link_gbps: float = 400.0
    node_link_gbps: float = 2400.0  # a guess: NVLink of an A100, one direction


@dataclass(frozen=True)
class Traffic:
    """Bytes of a step: what the busiest rank sends inside its node, and what the busiest node sends to others."""

    inside: float = 0
    between: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between)

    def times(self, factor: float) -> Traffic:
        return Traffic(self.inside * factor, self.between * factor)


@dataclass(frozen=True)
class Cost:
    """One optimiser step. Seconds add up: teacher, with an EMA teacher + student + optimizer."""

    traffic: Traffic
    teacher_s: float
    student_s: float
    optimizer_s: float

    @property
    def seconds(self) -> float:
        return self.teacher_s + self.student_s + self.optimizer_s


def step_cost(
    geometry: Geometry,
    zero: Zero,
    precision: Precision,
    machine: Machine,
    *,
    accumulation: int,
    placement: str,
    stages: int | None = None,
) -> Cost:
    """Predicted cost of a step.

    Assumed: a pipeline's exchange runs under its stage's work, the student's ZeRO-3 gathers run under the pass that needs them, and
    reductions under backward where overlap_comm is set; the gathering of new weights after a step is waited for.
    """
    student, teacher = geometry.student, geometry.teacher
    n, g, w = student.parameters, precision.gradient, precision.weight

    def over(num_bytes: float) -> Traffic:
        return ring(num_bytes, machine)

    teacher_traffic, teacher_s = Traffic(), 0.0
    if teacher is not None:
        teacher_s = _compute(teacher.flops, machine)
        if placement == "pipeline":
            teacher_traffic = stream_traffic(teacher, stages, machine)
            teacher_s = max(teacher_s, _transfer(teacher_traffic, machine))
        elif placement == "zero3":  # a block is fetched, then run: nothing is hidden
            teacher_traffic = over(sum(teacher.block_bytes))
            teacher_s += _transfer(teacher_traffic, machine)
    # DeepSpeed all-reduces a bucket and keeps its part, unless it is told to reduce to the owner.
    reduce = over(g * n * (1 if zero.stage == 3 or zero.reduce_once else 2))
    forward, backward = _compute(student.forward_flops, machine), _compute(student.backward_flops, machine)
    if zero.stage == 3:
        gather, again = over(w * n), over(w * max(0, n - zero.reuse_distance // 2 - zero.prefetch))
        micro = gather + again + reduce
        student_s = accumulation * (
            max(forward, _transfer(gather, machine)) + max(backward, _transfer(again + reduce, machine))
        )
        traffic, optimizer_s = micro.times(accumulation), 0.0
    else:
        reductions = accumulation if zero.stage == 2 else 1  # stages 0 and 1 reduce once a step
        exposed = (
            max(0.0, _transfer(reduce, machine) - backward) if zero.overlap else _transfer(reduce, machine)
        )
        student_s = accumulation * (forward + backward) + reductions * exposed
        gather = over(w * n) if zero.stage else Traffic()
        traffic, optimizer_s = reduce.times(reductions) + gather, _transfer(gather, machine)
    share = n / (machine.gpus if zero.stage else 1)
    touched = share * (2 * (ADAM + MASTER) + MASTER)  # moments and masters read and written, gradients read
    optimizer_s += touched / (HOST_GB_S if zero.offload_optimizer else DEVICE_GB_S) / 1e9
    if zero.offload_optimizer:
        optimizer_s += (g * accumulation + w) * share / HOST_GB_S / 1e9
    if zero.offload_parameters:
        optimizer_s += 2 * w * share * accumulation / HOST_GB_S / 1e9
    if (
        geometry.ema is not None
    ):  # it runs once a micro-batch, and follows the student once a step: read twice, written once
        teacher_s += _compute(geometry.ema.flops, machine)
        optimizer_s += 3 * geometry.ema.weight_bytes / DEVICE_GB_S / 1e9
        if zero.stage == 3:
            followed = over(geometry.ema.weight_bytes)
            traffic, optimizer_s = traffic + followed, optimizer_s + _transfer(followed, machine)
    return Cost(
        traffic + teacher_traffic.times(accumulation), accumulation * teacher_s, student_s, optimizer_s
    )


def ring(num_bytes: float, machine: Machine) -> Traffic:
    """A reduce-scatter or all-gather of so many bytes over all ranks, as rings: each rank sends all but its own share.

    Rings pass through a node, so a node's way out carries what one rank sends, whatever the number of its GPUs.
    """
    sent = num_bytes * (machine.gpus - 1) / machine.gpus
    return Traffic(
        sent if machine.gpus_per_node > 1 else 0, sent if machine.gpus > machine.gpus_per_node else 0
    )


def stream_traffic(teacher: TeacherGeometry, stages: int, machine: Machine) -> Traffic:
    """One clock of every group: the busiest rank's bytes inside its node, the busiest node's bytes to others."""
    inside, between = [0.0] * machine.gpus, [0.0] * -(-machine.gpus // machine.gpus_per_node)
    for first in range(0, machine.gpus, stages):
        for source in range(stages):
            node = (first + source) // machine.gpus_per_node
            for target in range(stages):
                size = message_bytes(teacher, stages, source=source, target=target) if source != target else 0
                if (first + target) // machine.gpus_per_node == node:
                    inside[first + source] += size
                else:
                    between[node] += size
    return Traffic(max(inside), max(between))


def _compute(flops: float, machine: Machine) -> float:
    return flops / (machine.tflops * 1e12 * EFFICIENCY)


def _transfer(traffic: Traffic, machine: Machine) -> float:
    seconds = (
        traffic.inside / (machine.node_link_gbps / 8 * 1e9),
        traffic.between / (machine.link_gbps / 8 * 1e9),
    )
    return max(seconds) / LINK_EFFICIENCY
