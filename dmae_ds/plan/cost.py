"""Seconds of a step, from FLOPs and bytes over links. Pure numbers.

Nothing here was measured on a GPU. The guesses are the constants below; the two that matter most are
arguments: the peak rate of a device (`tflops`) and the rates of the links.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmae_ds.plan.geometry import Geometry, TeacherGeometry
from dmae_ds.plan.memory import ADAM, MASTER, Precision, Zero, message_bytes

EFFICIENCY = 0.4  # achieved share of `tflops`; a guess: usual for ViTs of width 768-1280 in bf16
LINK_EFFICIENCY = 0.7  # achieved share of a link's rate; a guess
DEVICE_GB_S = 1500.0  # memory rate of a GPU, which limits AdamW; a guess
HOST_GB_S = 20.0  # a rank's share of PCIe and of the host's memory, for offloading; a guess


@dataclass(frozen=True)
class Machine:
    """The GPUs and their links, with peak rates."""

    gpus: int
    gpus_per_node: int
    memory_gib: float
    tflops: float = 300.0  # TFLOP/s of a device
    link_gbps: float = 400.0  # Gbit/s of a node to other nodes
    node_link_gbps: float = (
        2400.0  # Gbit/s of a device inside its node; a guess: NVLink of an A100, one direction
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes that are sent in a step."""

    inside: float = 0  # by the busiest rank inside its node
    between: float = 0  # by the busiest node to other nodes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between)

    def times(self, factor: float) -> Traffic:
        return Traffic(self.inside * factor, self.between * factor)


@dataclass(frozen=True)
class Cost:
    """Traffic and seconds of one optimiser step; `teacher_s` includes an EMA teacher."""

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
    """Predict the cost of a step.

    Assumed overlap: a pipeline's exchange with its stage's work, the student's ZeRO-3 gathers with the pass
      that needs
    them, and reductions with backward where overlap_comm is set. Gathering new weights after a step overlaps
    with nothing.
    """
    student, teacher = geometry.student, geometry.teacher
    n, gradient_bytes, weight_bytes = student.parameters, precision.gradient, precision.weight

    def over(num_bytes: float) -> Traffic:
        return ring(num_bytes, machine)

    teacher_traffic, teacher_s = Traffic(), 0.0
    if teacher is not None:
        teacher_s = _compute(teacher.flops, machine)
        if placement == "pipeline":
            teacher_traffic = stream_traffic(teacher, stages, machine)
            teacher_s = max(teacher_s, _transfer(teacher_traffic, machine))
        elif placement == "zero3":  # a block is fetched, then run, without overlap
            teacher_traffic = over(sum(teacher.block_bytes))
            teacher_s += _transfer(teacher_traffic, machine)
    # DeepSpeed all-reduces a bucket and keeps its part, unless it is told to reduce to the owner.
    passes = 1 if zero.stage == 3 or zero.reduce_once else 2
    reduce = over(gradient_bytes * n * passes)
    forward, backward = _compute(student.forward_flops, machine), _compute(student.backward_flops, machine)
    if zero.stage == 3:
        gather = over(weight_bytes * n)
        again = over(weight_bytes * max(0, n - zero.reuse_distance // 2 - zero.prefetch))
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
        gather = over(weight_bytes * n) if zero.stage else Traffic()
        traffic, optimizer_s = reduce.times(reductions) + gather, _transfer(gather, machine)
    share = n / (machine.gpus if zero.stage else 1)
    touched = share * (2 * (ADAM + MASTER) + MASTER)  # moments and masters read and written, gradients read
    optimizer_s += touched / (HOST_GB_S if zero.offload_optimizer else DEVICE_GB_S) / 1e9
    if zero.offload_optimizer:
        optimizer_s += (gradient_bytes * accumulation + weight_bytes) * share / HOST_GB_S / 1e9
    if zero.offload_parameters:
        optimizer_s += 2 * weight_bytes * share * accumulation / HOST_GB_S / 1e9
    if geometry.ema is not None:
        # It runs in every micro-batch, and its weights are read twice and written once in a step.
        teacher_s += _compute(geometry.ema.flops, machine)
        optimizer_s += 3 * geometry.ema.weight_bytes / DEVICE_GB_S / 1e9
        if zero.stage == 3:
            followed = over(geometry.ema.weight_bytes)
            traffic, optimizer_s = traffic + followed, optimizer_s + _transfer(followed, machine)
    return Cost(
        traffic + teacher_traffic.times(accumulation), accumulation * teacher_s, student_s, optimizer_s
    )


def ring(num_bytes: float, machine: Machine) -> Traffic:
    """Traffic of a reduce-scatter or all-gather of so many bytes over all ranks, by rings.

    Each rank sends all but its own share. A ring passes through a node once, so a node sends to others what
    one rank sends, whatever the number of its GPUs.
    """
    sent = num_bytes * (machine.gpus - 1) / machine.gpus
    return Traffic(
        sent if machine.gpus_per_node > 1 else 0, sent if machine.gpus > machine.gpus_per_node else 0
    )


def stream_traffic(teacher: TeacherGeometry, stages: int, machine: Machine) -> Traffic:
    """Traffic of one pipeline tick in all stage groups."""
    num_nodes = -(-machine.gpus // machine.gpus_per_node)
    inside, between = [0.0] * machine.gpus, [0.0] * num_nodes
    for first in range(0, machine.gpus, stages):
        for source in range(stages):
            node = (first + source) // machine.gpus_per_node
            for target in range(stages):
                if source == target:
                    continue
                size = message_bytes(teacher, stages, source=source, target=target)
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
