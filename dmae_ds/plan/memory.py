"""Bytes a rank needs, by part, from a geometry (geometry.py), a ZeRO configuration and a teacher's placement. Pure numbers.

Read off DeepSpeed 0.19.8's sources and held against measured runs (tests/plan/test_measured.py). Every term
is a tensor that somebody allocates; nothing is fitted. DeepSpeed's own estimators count model states alone
(tests/plan/test_memory.py says where they differ): the buckets and flat copies below are beside them, and at
the default `reduce_bucket_size` of 5e8 elements they are larger than a ViT-B.

The two kinds of device differ in what free memory is worth:

    a GPU's allocator gives freed blocks to whoever asks next: the worst moment of a step counts
    glibc keeps freed blocks below 32 MiB for small tensors and maps larger ones one by one: so the small
    tensors' worst moment stays resident, and the flat buffers' worst moment comes on top; and an untouched
    page costs nothing
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from dmae_ds.plan.geometry import Geometry, TeacherGeometry
from dmae_ds.plan.trace import Trace
from dmae_ds.teacher.stages import held_blocks

MIB = 2**20
# What libraries take beside tensors. CPU: measured with a student of 2 MB, peak RSS above the start: gloo,
# MKL, DeepSpeed's modules that are imported by ZeRO. GPU: CUDA's context and NCCL's buffers, a guess.
LIBRARIES_CPU = {0: 42 * MIB, 1: 96 * MIB, 2: 96 * MIB, 3: 110 * MIB}
LIBRARIES_GPU = 1024 * MIB
ADAM = 8  # bytes a parameter: two moments in fp32
MASTER = 4
_ALL_REDUCE_ELEMENTS = (
    500_000_000  # DeepSpeed's flat copy of gradients without ZeRO, a constant of its engine
)


@dataclass(frozen=True)
class Zero:
    """What of a DeepSpeed config decides about memory and traffic; element counts, with DeepSpeed's defaults."""

    stage: int
    reduce_bucket: int = 500_000_000
    overlap: bool = False
    prefetch: int = 50_000_000
    reuse_distance: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_parameters: bool = False
    reduce_once: bool = (
        False  # reduce to the owner alone, instead of all-reducing a bucket (use_multi_rank_bucket_allreduce)
    )

    @classmethod
    def of(cls, config: dict) -> Zero:
        """From a DeepSpeed config as `config.deepspeed.load_deepspeed` gives it."""
        found = config.get("zero_optimization", {})
        stage = found.get("stage", 0)
        return cls(
            stage=stage,
            reduce_bucket=int(found.get("reduce_bucket_size", cls.reduce_bucket)),
            overlap=found.get("overlap_comm", stage == 3) is True,
            prefetch=int(found.get("stage3_prefetch_bucket_size", cls.prefetch)),
            reuse_distance=int(found.get("stage3_max_reuse_distance", cls.reuse_distance)),
            offload_optimizer=found.get("offload_optimizer", {}).get("device", "none") != "none",
            offload_parameters=found.get("offload_param", {}).get("device", "none") != "none",
            reduce_once=not found.get("use_multi_rank_bucket_allreduce", True),
        )


@dataclass(frozen=True)
class Precision:
    """Bytes of a weight and of a gradient, and whether fp32 masters are kept even without ZeRO."""

    weight: int
    gradient: int
    comm_dtypes: int = 1  # buckets under autocast: one for what is multiplied in bf16, one for the rest


PRECISIONS = {
    "fp32": Precision(4, 4),
    "bf16_autocast": Precision(4, 4, 2),
    "bf16": Precision(2, 2),
    "fp16": Precision(2, 2),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank on its device at the worst moment of a step, by part; `host`: what offloading puts into RAM."""

    parameters: float = 0
    gradients: float = 0  # with DeepSpeed's buckets and flat copies
    optimizer: float = 0  # moments, fp32 masters and the step's temporaries
    activations: float = 0
    teacher: float = 0  # weights and the working set of a block, and an EMA teacher's weights
    stream: float = 0  # prepared micro-batches, features, messages
    libraries: float = 0
    host: float = 0

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
    placement: str,
    stages: int | None = None,
    gpu: bool,
) -> Memory:
    """Memory of the rank that needs most. placement: replicated, pipeline (with `stages`) or zero3."""
    student = student_memory(
        geometry.student, zero, PRECISIONS[precision], ranks=ranks, accumulation=accumulation, gpu=gpu
    )
    libraries = LIBRARIES_GPU if gpu else LIBRARIES_CPU[zero.stage]
    beside = Memory(
        teacher=teacher_bytes(geometry.teacher, placement, stages, ranks),
        stream=stream_bytes(geometry, stages),
        libraries=libraries,
    )
    if geometry.ema is not None:
        beside = beside + Memory(teacher=geometry.ema.weight_bytes, stream=geometry.ema.feature_bytes)
    working = max(
        (part.working_bytes for part in (geometry.teacher, geometry.ema) if part is not None), default=0
    )
    if working > student.activations:  # it runs before the student's activations exist, in the same memory
        student = student + Memory(activations=working - student.activations)
    return student + beside + Memory(parameters=geometry.buffer_bytes)


def teacher_bytes(teacher: TeacherGeometry | None, placement: str, stages: int | None, ranks: int) -> float:
    """Weights on the rank that holds most; zero3: a share of the blocks, and the one at hand (teacher/sharded.py)."""
    if teacher is None:
        return 0
    if placement == "pipeline":
        shares = [
            sum(teacher.block_bytes[number] for number in blocks)
            for blocks in held_blocks(teacher.depth, stages)
        ]
        return teacher.embedding_bytes + max(shares)
    if placement == "zero3":
        return teacher.embedding_bytes + sum(teacher.block_bytes) / ranks + max(teacher.block_bytes)
    return teacher.weight_bytes


def stream_bytes(geometry: Geometry, stages: int | None) -> float:
    """Micro-batches with their features that wait for the student: one, or a pipeline's queue of 2P and its messages.

    A pipeline's clock sends one buffer and has two to receive into: in each at most the tokens of P owners,
    one's own, and P - 1 features; and the P outputs of the stage are alive beside them (teacher/pipeline.py,
    teacher/messages.py).
    """
    teacher = geometry.teacher
    if stages is None or teacher is None:
        return geometry.batch_bytes + (0 if teacher is None else teacher.feature_bytes)
    travelling = teacher.token_bytes + teacher.id_bytes
    message = max(
        sum(message_bytes(teacher, stages, source=s, target=t) for t in range(stages)) for s in range(stages)
    )
    received = max(
        sum(message_bytes(teacher, stages, source=s, target=t) for s in range(stages)) for t in range(stages)
    )
    return (
        (2 * stages + 1) * geometry.batch_bytes
        + 2 * stages * teacher.feature_bytes
        + message
        + 2 * received
        + stages * travelling
    )


def message_bytes(teacher: TeacherGeometry, stages: int, *, source: int, target: int) -> int:
    """What stage `source` sends to stage `target` at a clock. Features are counted at the last stage, where most taps are."""
    travelling = teacher.token_bytes + teacher.id_bytes
    return ((target == 0) + stages * (target == source + 1)) * travelling + (
        source == stages - 1
    ) * teacher.feature_bytes


def student_memory(
    trace: Trace, zero: Zero, precision: Precision, *, ranks: int, accumulation: int, gpu: bool
) -> Memory:
    """Weights, gradients, optimiser and activations of what is trained, at the worst moment."""
    n, share = trace.parameters, trace.parameters / ranks
    static = _static(n, zero, precision, ranks)
    moments = _backward(trace, zero, precision, ranks=ranks, accumulation=accumulation, gpu=gpu)
    if gpu:
        worst = max(
            (
                moment
                for moment in (
                    *moments,
                    _reduce(n, zero, precision, ranks, accumulation, gpu),
                    _step(trace, zero, precision, ranks, gpu),
                )
            ),
            key=lambda m: m.total,
        )
        return static + worst
    # glibc: the heap's worst moment stays, the mapped buffers' worst moment comes on top.
    small = max(moments, key=lambda moment: moment.total)
    freed = {0: 0, 1: n, 2: n, 3: n + share}[
        zero.stage
    ] * precision.weight  # the weights as they were before DeepSpeed flattened them
    if freed > small.total:
        small = small + Memory(activations=freed - small.total)
    large = max(
        (_reduce(n, zero, precision, ranks, accumulation, gpu), _step(trace, zero, precision, ranks, gpu)),
        key=lambda moment: moment.total,
    )
    return static + small + large


def _static(n: int, zero: Zero, precision: Precision, ranks: int) -> Memory:
    """What is there from the first step to the last."""
    if zero.stage == 0:
        return Memory(
            parameters=precision.weight * n, optimizer=(ADAM + (0 if precision.weight == 4 else MASTER)) * n
        )
    states, share = (ADAM + MASTER) * n / ranks, precision.weight * n / (ranks if zero.stage == 3 else 1)
    gradients = (
        precision.gradient * n / ranks if zero.stage == 3 else 0
    )  # stage 3 keeps its partition of them
    host = (
        states + gradients + (precision.weight * n / ranks if zero.stage < 3 else 0)
        if zero.offload_optimizer
        else 0
    ) + (share if zero.offload_parameters else 0)
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
    """A moment for every gradient: activations, gathered weights, gradients so far. On a CPU, small tensors alone."""
    n, done, moments = trace.parameters, 0, []
    in_grad = zero.stage == 0 or (zero.stage == 1 and not zero.overlap)  # gradients stay whole until the step
    buckets = _bucket_bytes(n, zero, precision, gpu) if gpu else 0
    waiting = (
        precision.gradient * n / ranks
        if zero.stage in (1, 2) and not in_grad and accumulation > 1 and not zero.offload_optimizer
        else 0
    )
    for gradient in trace.gradients:
        gathered = 0
        if (
            zero.stage == 3
        ):  # the layer at hand, those on their way, and those that backward needs again within the reuse distance
            gathered = precision.weight * min(
                n - done, max(zero.reuse_distance // 2 + zero.prefetch, gradient.numel)
            )
        whole = precision.gradient * (n if accumulation > 1 else done) if in_grad else 0
        moments.append(
            Memory(activations=gradient.before, parameters=gathered, gradients=whole + buckets + waiting)
        )
        done += gradient.numel
    return moments


def _reduce(n: int, zero: Zero, precision: Precision, ranks: int, accumulation: int, gpu: bool) -> Memory:
    """The last bucket on its way to the other ranks, after backward. On a CPU, large tensors alone."""
    g, share = precision.gradient, n / ranks
    if zero.stage == 0:
        whole = g * n if gpu else 0  # on a CPU they are small tensors, counted there
        return Memory(gradients=whole + g * min(n, _ALL_REDUCE_ELEMENTS))
    bucket = g * min(n, zero.reduce_bucket)
    # Stages 1, 2: a flat copy is all-reduced. Stage 3: a copy sorted by rank is reduce-scattered; gloo clones
    # it once more.
    copies = bucket * (2 if zero.stage == 3 and not gpu else 1)
    partition = (
        g * share * (2 if accumulation > 1 else 1)
        if zero.stage in (1, 2) and not zero.offload_optimizer
        else 0
    )
    return Memory(gradients=_bucket_bytes(n, zero, precision, gpu) + max(copies, partition))


def _step(trace: Trace, zero: Zero, precision: Precision, ranks: int, gpu: bool) -> Memory:
    """AdamW: fp32 gradients in one piece, and its temporaries (a CPU's takes two of a tensor's size, a GPU's foreach one)."""
    n = trace.parameters
    kept = (
        _bucket_bytes(n, zero, precision, gpu) if zero.stage == 3 else 0
    )  # stage 3 never gives its bucket back
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
    """DeepSpeed's gradient buckets: a GPU holds them whole (twice under overlap_comm), a CPU the pages that were written."""
    if zero.stage == 0:
        return 0
    if not gpu:
        return precision.gradient * min(n, zero.reduce_bucket)
    copies = precision.comm_dtypes * (2 if zero.overlap and zero.stage < 3 else 1)
    if zero.stage == 3 and precision.comm_dtypes == 2:
        return zero.reduce_bucket * (4 + 2)  # one in each dtype
    return zero.reduce_bucket * precision.gradient * copies
