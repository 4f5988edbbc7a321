"""Bytes that a rank needs, from a geometry, a ZeRO configuration and a teacher's placement. Pure numbers.

Read from DeepSpeed 0.19.8's sources and compared with measured runs (tests/plan/test_measured.py). Every term
is a tensor that is allocated; nothing is fitted. DeepSpeed's own estimators count model states only
(tests/plan/test_memory.py tests the differences); the buckets and flat copies below come on top, and at the
default `reduce_bucket_size` of 5e8 elements they are larger than a ViT-B.

The two kinds of device differ in what becomes of freed memory:

    A GPU's allocator gives freed blocks to any later tensor: the worst moment of a step counts.
    On a CPU, glibc keeps freed blocks below 32 MiB for small tensors and maps larger ones one by one: the
    worst moment of the small tensors stays resident, the worst moment of the flat buffers comes on top, and
    an untouched page is free.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dmae_ds.output.units import MIB
from dmae_ds.plan.geometry import Geometry
from dmae_ds.plan.teacher_memory import Placed, stream_bytes, teacher_bytes
from dmae_ds.plan.trace import Trace

# Memory of libraries, without tensors. CPU, by ZeRO stage: peak RSS above the start, measured with a student
# of 2 MB (gloo, MKL, modules that ZeRO imports). GPU: CUDA's context and NCCL's buffers, a guess.
LIBRARIES_CPU = {0: 42 * MIB, 1: 96 * MIB, 2: 96 * MIB, 3: 110 * MIB}
LIBRARIES_GPU = 1024 * MIB
ADAM = 8  # bytes a parameter: two moments in fp32
MASTER = 4
# DeepSpeed's flat copy of gradients without ZeRO, a constant of its engine.
_ALL_REDUCE_ELEMENTS = 500_000_000


@dataclass(frozen=True)
class Zero:
    """The DeepSpeed options that memory and traffic depend on, with DeepSpeed's defaults.

    Sizes are in elements.
    """

    stage: int
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    prefetch: int = 50_000_000
    reuse_distance: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_parameters: bool = False
    # Reduce a bucket to its owner instead of all-reducing it (use_multi_rank_bucket_allreduce=false).
    reduce_once: bool = False
    persistence: int = 100_000  # ZeRO-3 keeps tensors up to this size whole
    reduce_fp32: bool = False  # gradients cross the ranks in fp32, whatever the precision

    @classmethod
    def of(cls, config: dict) -> Zero:
        """Read a DeepSpeed config as `config.deepspeed.load_deepspeed` returns it."""
        section, autocast = config.get("zero_optimization", {}), config.get("torch_autocast", {})
        stage = section.get("stage", 0)
        in_fp32 = autocast.get("enabled") and autocast.get("lower_precision_safe_modules") == []
        return cls(
            stage=stage,
            reduce_bucket=int(section.get("reduce_bucket_size", cls.reduce_bucket)),
            overlap=section.get("overlap_comm", stage == 3) is True,
            prefetch=int(section.get("stage3_prefetch_bucket_size", cls.prefetch)),
            reuse_distance=int(section.get("stage3_max_reuse_distance", cls.reuse_distance)),
            offload_optimizer=section.get("offload_optimizer", {}).get("device", "none") != "none",
            offload_parameters=section.get("offload_param", {}).get("device", "none") != "none",
            reduce_once=not section.get("use_multi_rank_bucket_allreduce", True),
            persistence=int(section.get("stage3_param_persistence_threshold", cls.persistence)),
            reduce_fp32=bool(in_fp32) or config.get("communication_data_type") == "fp32",
        )


@dataclass(frozen=True)
class Precision:
    """Bytes of a weight, of a gradient, and of a matrix's gradient on its way to the other ranks."""

    weight: int
    gradient: int
    reduced: int
    products: str  # dtype of the student's matrix products, a key of `Machine.peak`
    comm_dtypes: int = 1  # sets of buckets; under autocast one for bf16 products and one for the rest


PRECISIONS = {
    "fp32": Precision(4, 4, 4, "fp32"),
    "bf16_autocast": Precision(4, 4, 2, "bf16", 2),
    "bf16": Precision(2, 2, 2, "bf16"),
    "fp16": Precision(2, 2, 2, "bf16"),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank on its device, by part, at the worst moment of a step."""

    parameters: float = 0
    gradients: float = 0  # with DeepSpeed's buckets and flat copies
    optimizer: float = 0  # moments, fp32 master weights and temporaries of the step
    activations: float = 0
    teacher: float = 0  # weights of the frozen and of an EMA teacher
    stream: float = 0  # prepared micro-batches, features, messages
    libraries: float = 0
    host: float = 0  # in the host's memory, by offloading; not in the total

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )


PARTS = tuple(field.name for field in fields(Memory) if field.name != "host")


def rank_memory(
    geometry: Geometry,
    zero: Zero,
    *,
    precision: str,
    ranks: int,
    accumulation: int,
    placed: Placed,
    gpu: bool,
) -> Memory:
    """Memory of the rank that needs most, with every teacher where `placed` says."""
    student = student_memory(
        geometry.student, zero, PRECISIONS[precision], ranks=ranks, accumulation=accumulation, gpu=gpu
    )
    libraries = LIBRARIES_GPU if gpu else LIBRARIES_CPU[zero.stage]
    others = Memory(
        teacher=sum(
            teacher_bytes(teacher, placed[name], ranks) for name, teacher in geometry.teachers.items()
        ),
        stream=stream_bytes(geometry, placed),
        libraries=libraries,
    )
    if geometry.ema is not None:
        others = others + Memory(teacher=geometry.ema.weight_bytes, stream=geometry.ema.feature_bytes)
    working = max(
        (part.working_bytes for part in (*geometry.teachers.values(), geometry.ema) if part is not None),
        default=0,
    )
    if working > student.activations:  # in the same memory, before the student's activations exist
        student = student + Memory(activations=working - student.activations)
    return student + others + Memory(parameters=geometry.buffer_bytes)


def student_memory(
    trace: Trace, zero: Zero, precision: Precision, *, ranks: int, accumulation: int, gpu: bool
) -> Memory:
    """Bytes of the trained networks at the worst moment: weights, gradients, optimiser, activations."""
    n, share = trace.parameters, trace.parameters / ranks
    static = _static(n, zero, precision, ranks)
    moments = _backward(trace, zero, precision, ranks=ranks, accumulation=accumulation, gpu=gpu)
    reduce = _reduce(n, zero, precision, ranks, accumulation, gpu)
    step = _step(trace, zero, precision, ranks, gpu)

    def total(moment: Memory) -> float:
        return moment.total

    if gpu:
        return static + max(*moments, reduce, step, key=total)
    # glibc: the heap's worst moment stays, the mapped buffers' worst moment comes on top.
    small = max(moments, key=total)
    # The weights as they were before DeepSpeed flattened them.
    freed = {0: 0, 1: n, 2: n, 3: n + share}[zero.stage] * precision.weight
    if freed > small.total:
        small = small + Memory(activations=freed - small.total)
    large = max(reduce, step, key=total)
    return static + small + large


def _static(n: int, zero: Zero, precision: Precision, ranks: int) -> Memory:
    """Bytes that stay from the first step to the last."""
    if zero.stage == 0:
        master = 0 if precision.weight == 4 else MASTER
        return Memory(parameters=precision.weight * n, optimizer=(ADAM + master) * n)
    states = (ADAM + MASTER) * n / ranks
    share = precision.weight * n / (ranks if zero.stage == 3 else 1)
    # Stage 3 keeps its partition of the gradients.
    gradients = precision.gradient * n / ranks if zero.stage == 3 else 0
    host = share if zero.offload_parameters else 0
    if zero.offload_optimizer:
        weights = precision.weight * n / ranks if zero.stage < 3 else 0
        host = states + gradients + weights + host
    on_host = zero.offload_optimizer
    return Memory(
        parameters=0 if zero.offload_parameters else share,
        optimizer=0 if on_host else states,
        gradients=0 if on_host else gradients,
        host=host,
    )


def _backward(
    trace: Trace, zero: Zero, precision: Precision, *, ranks: int, accumulation: int, gpu: bool
) -> list[Memory]:
    """Memory at the moment of every gradient: activations, gathered weights, gradients so far.

    On a CPU these are the small tensors only.
    """
    n, done, moments = trace.parameters, 0, []
    in_grad = zero.stage == 0 or (zero.stage == 1 and not zero.overlap)  # gradients stay whole until the step
    buckets = _bucket_bytes(n, zero, precision, gpu) if gpu else 0
    is_partitioned = zero.stage in (1, 2) and not in_grad and not zero.offload_optimizer
    waiting = precision.gradient * n / ranks if is_partitioned and accumulation > 1 else 0
    for gradient in trace.gradients:
        gathered = 0
        if zero.stage == 3:
            # The current layer, prefetched ones, and those that backward needs again within the reuse
            # distance.
            ahead = max(zero.reuse_distance // 2 + zero.prefetch, gradient.numel)
            gathered = precision.weight * min(n - done, ahead)
        whole = 0
        if in_grad:
            whole = precision.gradient * (n if accumulation > 1 else done)
        moments.append(
            Memory(activations=gradient.before, parameters=gathered, gradients=whole + buckets + waiting)
        )
        done += gradient.numel
    return moments


def _reduce(n: int, zero: Zero, precision: Precision, ranks: int, accumulation: int, gpu: bool) -> Memory:
    """Memory after backward, when the last bucket is sent to the other ranks.

    On a CPU these are the large tensors only.
    """
    gradient_bytes = precision.gradient
    if zero.stage == 0:
        whole = gradient_bytes * n if gpu else 0  # on a CPU they are small tensors, counted in _backward
        return Memory(gradients=whole + gradient_bytes * min(n, _ALL_REDUCE_ELEMENTS))
    bucket = gradient_bytes * min(n, zero.reduce_bucket)
    # Stages 1, 2: a flat copy is all-reduced. Stage 3: a copy sorted by rank is reduce-scattered; gloo clones
    # it once more.
    copies = bucket * (2 if zero.stage == 3 and not gpu else 1)
    partition = earlier = 0
    if zero.stage in (1, 2) and not zero.offload_optimizer:
        partition = gradient_bytes * (n / ranks) * (2 if accumulation > 1 else 1)
        # Of the buckets before the last one, whose copy is still there.
        earlier = partition * (1 - min(n, zero.reduce_bucket) / n)
    return Memory(gradients=_bucket_bytes(n, zero, precision, gpu) + max(copies + earlier, partition))


def _step(trace: Trace, zero: Zero, precision: Precision, ranks: int, gpu: bool) -> Memory:
    """Memory in AdamW's step: fp32 gradients in one piece, and temporaries.

    On a CPU AdamW makes two temporaries of a tensor's size, on a GPU one of all tensors' (foreach).
    """
    n = trace.parameters
    kept = _bucket_bytes(n, zero, precision, gpu) if zero.stage == 3 else 0  # stage 3 never frees its bucket
    if zero.stage == 0:
        largest = max(gradient.numel for gradient in trace.gradients)
        return Memory(
            gradients=precision.gradient * n if gpu else 0, optimizer=4 * n if gpu else 2 * 4 * largest
        )
    if zero.offload_optimizer:
        return Memory(gradients=kept)
    flat = MASTER * n / ranks
    source = 0 if zero.stage == 3 else precision.gradient * n / ranks  # freed once the flat copy exists
    temporaries = flat * (1 if gpu else 2)
    return Memory(gradients=kept + flat + max(source - temporaries, 0), optimizer=temporaries)


def _bucket_bytes(n: int, zero: Zero, precision: Precision, gpu: bool) -> float:
    """Bytes of DeepSpeed's gradient buckets: all on a GPU (twice with overlap_comm), used pages on a CPU."""
    if zero.stage == 0:
        return 0
    buffers = 2 if zero.overlap and zero.stage < 3 else 1  # filled in turns
    if not gpu:
        return precision.gradient * min(n, buffers * zero.reduce_bucket)
    copies = precision.comm_dtypes * buffers
    if zero.stage == 3 and precision.comm_dtypes == 2:
        return zero.reduce_bucket * (4 + 2)  # one in each dtype
    return zero.reduce_bucket * precision.gradient * copies
