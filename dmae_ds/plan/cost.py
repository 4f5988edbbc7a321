"""Seconds of a step, from FLOPs, kernels and bytes over links. Pure numbers.

Nothing here was measured on a GPU. The guesses are the constants below; those that matter most are arguments:
the peak rates of a device and the rates of the links.
"""

from __future__ import annotations

from dataclasses import dataclass

from dmae_ds.plan.geometry import EmaGeometry, Geometry, TeacherGeometry
from dmae_ds.plan.memory import ADAM, MASTER, Precision, Zero
from dmae_ds.plan.teacher_memory import Placed, Placement, message_bytes
from dmae_ds.plan.trace import Trace

# Achieved shares of the peak rate of matrix products, and the one that is expected where nothing else is
# known: published trainings reached 11 to 45% (table.py lists them), and those of masked autoencoders least.
BAND = (0.12, 0.25, 0.35, 0.45)
EFFICIENCY = 0.12
LAUNCH_S = 8e-6  # host time of a kernel in eager PyTorch; a guess: a step with small kernels waits for it
# Host time of ZeRO-3's hooks for a module and pass. Measured on a CPU core with tiny tensors: 0.4 ms; a
# server's core is assumed to be twice as fast.
HOOK_S = 2e-4
LINK_EFFICIENCY = 0.7  # achieved share of a link's rate; a guess
COLLECTIVE_S = 50e-6  # of a collective besides its bytes: hooks, launch, and the way round all ranks; a guess
DEVICE_SHARE = 0.75  # achieved share of a GPU's memory rate, which limits AdamW; a guess
HOST_GB_S = 20.0  # a rank's share of PCIe and of the host's memory, for offloading; a guess


@dataclass(frozen=True)
class Machine:
    """The GPUs and their links, with peak rates."""

    gpus: int
    gpus_per_node: int
    memory_gib: float
    tflops: float = 300.0  # TFLOP/s of a device in bf16
    fp32_tflops: float | None = None  # in fp32; None: a share of `tflops`
    tf32: bool = True  # whether fp32 products use TF32, as the recipe says
    link_gbps: float = 400.0  # Gbit/s of a node to other nodes
    node_link_gbps: float = (
        2400.0  # Gbit/s of a device inside its node; a guess: NVLink of an A100, one direction
    )
    device_gb_s: float = 1500.0  # memory rate of a device, of an A100 by DEVICE_SHARE
    worker_images_s: float = 500.0  # images that a loader worker decodes and crops in a second
    storage_gb_s: float = 1.0  # GB/s that a node reads; a guess
    efficiency: float = EFFICIENCY  # achieved share of the peak rates
    band: tuple[float, ...] = BAND  # shares that it may be, in ascending order

    def peak(self, products: str) -> float:
        """TFLOP/s of matrix products in "bf16" (and fp16), or in "fp32".

        NVIDIA's GPUs have half of bf16's rate in TF32, and about a 16th without it (A100: 19.5 of 312).
        """
        if products != "fp32":
            return self.tflops
        return self.fp32_tflops or self.tflops / (2 if self.tf32 else 16)


@dataclass(frozen=True)
class Traffic:
    """Bytes that are sent in a step, and the number of collectives."""

    inside: float = 0  # by the busiest rank inside its node
    between: float = 0  # by the busiest node to other nodes
    calls: float = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between, self.calls + other.calls)

    def times(self, factor: float) -> Traffic:
        return Traffic(self.inside * factor, self.between * factor, self.calls * factor)


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

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.traffic + other.traffic,
            self.teacher_s + other.teacher_s,
            self.student_s + other.student_s,
            self.optimizer_s + other.optimizer_s,
        )


def step_cost(
    geometry: Geometry,
    zero: Zero,
    precision: Precision,
    machine: Machine,
    *,
    accumulation: int,
    placed: Placed,
    efficiency: float | None = None,
) -> Cost:
    """Predict the cost of a step.

    Assumed overlap: a pipeline's exchange with its stage's work, the student's ZeRO-3 gathers with the pass
    that needs them, and reductions with backward where overlap_comm is set, up to the last bucket: it is full
    when backward has ended. Gathering new weights after a step overlaps with nothing.
    efficiency: achieved share of the peak rates; None: the machine's
    """
    device = _Device(machine, machine.efficiency if efficiency is None else efficiency)
    cost = _student_cost(geometry.student, zero, precision, device, accumulation=accumulation)
    cost += _optimizer_cost(geometry.student, zero, precision, machine, accumulation=accumulation)
    for name, teacher in geometry.teachers.items():
        cost += _teacher_cost(teacher, device, placement=placed[name], accumulation=accumulation)
    if geometry.ema is not None:
        cost += _ema_cost(geometry.ema, zero, precision, device, accumulation=accumulation)
    return cost


@dataclass(frozen=True)
class _Device:
    """A machine whose GPUs achieve a share of their peak rates."""

    machine: Machine
    efficiency: float

    def seconds(self, flops: float, kernels: float, products: str, *, hooks: float = 0) -> float:
        """Seconds of so much work: of its products, or of the host that launches kernels and runs hooks."""
        compute = flops / (self.machine.peak(products) * 1e12 * self.efficiency)
        return max(compute, kernels * LAUNCH_S + hooks * HOOK_S)


def _teacher_cost(
    teacher: TeacherGeometry, device: _Device, *, placement: Placement, accumulation: int
) -> Cost:
    traffic, seconds = Traffic(), device.seconds(teacher.flops, teacher.kernels, teacher.products)
    if placement.name == "pipeline":
        traffic = stream_traffic(teacher, placement.stages, device.machine)
        seconds = max(seconds, _transfer(traffic, device.machine))
    elif placement.name == "zero3":  # a block is fetched while the one before it runs
        traffic = ring(sum(teacher.block_bytes), device.machine, calls=teacher.depth)
        fetched = _transfer(traffic, device.machine)
        seconds = max(seconds, fetched) + fetched / teacher.depth
    return Cost(traffic.times(accumulation), seconds * accumulation, 0, 0)


def _student_cost(
    student: Trace, zero: Zero, precision: Precision, device: _Device, *, accumulation: int
) -> Cost:
    n, machine = student.parameters, device.machine
    # A module has a weight and a bias, and ZeRO-3's hooks run before and after it.
    hooks = len(student.gradients) / 2 if zero.stage == 3 else 0
    forward = device.seconds(student.forward_flops, student.forward_kernels, precision.products, hooks=hooks)
    backward = device.seconds(
        student.backward_flops, student.backward_kernels, precision.products, hooks=hooks
    )
    # DeepSpeed all-reduces a bucket and keeps its part, unless it is told to reduce to the owner.
    passes = 1 if zero.stage == 3 or zero.reduce_once else 2
    bucket = min(n, zero.reduce_bucket)
    num_buckets = max(1, -(-n // bucket)) if bucket else 1
    reduce = ring(
        passes * reduced_bytes(student, zero, precision), machine, calls=num_buckets * precision.comm_dtypes
    )
    reduce_s = _transfer(reduce, machine)
    if zero.stage == 3:
        calls = sum(gradient.numel > zero.persistence for gradient in student.gradients)
        weight_bytes = precision.weight
        gather = ring(weight_bytes * n, machine, calls=calls)
        share = max(0, n - zero.reuse_distance // 2 - zero.prefetch) / n
        again = gather.times(share)
        seconds = max(forward, _transfer(gather, machine))
        seconds += max(backward, _transfer(again, machine) + reduce_s)
        traffic = gather + again + reduce
        return Cost(traffic.times(accumulation), 0, seconds * accumulation, 0)
    reductions = accumulation if zero.stage == 2 else 1  # stages 0 and 1 reduce once a step
    exposed = reduce_s
    if zero.overlap:
        last = (n - (num_buckets - 1) * bucket) / n
        exposed = max(reduce_s * last, reduce_s - backward)
    seconds = accumulation * (forward + backward) + reductions * exposed
    return Cost(reduce.times(reductions), 0, seconds, 0)


def reduced_bytes(student: Trace, zero: Zero, precision: Precision) -> float:
    """Bytes of all gradients in the dtypes in which they cross the ranks.

    Under autocast DeepSpeed sends those of matrix products in bf16 and the rest in fp32.
    """
    if zero.reduce_fp32:
        return 4 * student.parameters
    matrices = sum(gradient.numel for gradient in student.gradients if gradient.is_matrix)
    return precision.reduced * matrices + precision.gradient * (student.parameters - matrices)


def _optimizer_cost(
    student: Trace, zero: Zero, precision: Precision, machine: Machine, *, accumulation: int
) -> Cost:
    n, weight_bytes = student.parameters, precision.weight
    gather = ring(weight_bytes * n, machine, calls=1) if zero.stage in (1, 2) else Traffic()
    seconds = _transfer(gather, machine)
    share = n / (machine.gpus if zero.stage else 1)
    touched = share * (2 * (ADAM + MASTER) + MASTER)  # moments and masters read and written, gradients read
    seconds += touched / (HOST_GB_S if zero.offload_optimizer else machine.device_gb_s) / 1e9
    if zero.offload_optimizer:
        seconds += (precision.gradient * accumulation + weight_bytes) * share / HOST_GB_S / 1e9
    if zero.offload_parameters:
        seconds += 2 * weight_bytes * share * accumulation / HOST_GB_S / 1e9
    return Cost(gather, 0, 0, seconds)


def _ema_cost(
    ema: EmaGeometry, zero: Zero, precision: Precision, device: _Device, *, accumulation: int
) -> Cost:
    """It runs in every micro-batch. Where it follows, its weights are read twice and written once a step."""
    seconds = accumulation * device.seconds(ema.flops, ema.kernels, precision.products)
    if not ema.follows:
        return Cost(Traffic(), seconds, 0, 0)
    followed = ring(ema.weight_bytes, device.machine, calls=1) if zero.stage == 3 else Traffic()
    update = 3 * ema.weight_bytes / device.machine.device_gb_s / 1e9 + _transfer(followed, device.machine)
    return Cost(followed, seconds, 0, update)


def ring(num_bytes: float, machine: Machine, *, calls: float) -> Traffic:
    """Traffic of reduce-scatters or all-gathers of so many bytes over all ranks, by rings.

    Each rank sends all but its own share. A ring passes through a node once, so a node sends to others what
    one rank sends, whatever the number of its GPUs.
    """
    if machine.gpus == 1:
        return Traffic()
    sent = num_bytes * (machine.gpus - 1) / machine.gpus
    return Traffic(
        sent if machine.gpus_per_node > 1 else 0,
        sent if machine.gpus > machine.gpus_per_node else 0,
        calls,
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
    return Traffic(max(inside), max(between), 1)


def _transfer(traffic: Traffic, machine: Machine) -> float:
    seconds = (
        traffic.inside / (machine.node_link_gbps / 8 * 1e9),
        traffic.between / (machine.link_gbps / 8 * 1e9),
    )
    return max(seconds) / LINK_EFFICIENCY + traffic.calls * COLLECTIVE_S
