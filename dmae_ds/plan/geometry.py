"""What a recipe's networks weigh, compute and hold for a micro-batch: the numbers that every placement is made of.

Built on the meta device by the very functions that training uses, then run once on fake tensors (trace.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dmae_ds.config.run import RunConfig
from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import Normalize
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.ema import EmaModule, ema_features
from dmae_ds.objectives.needs import Progress
from dmae_ds.plan.trace import Trace, trace_inference, trace_training
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, meta_teacher, needed_depths, needs_top
from dmae_ds.teacher.grid import PatchView
from dmae_ds.teacher.top import Top, meta_top

WEIGHTS = {
    "fp32": torch.float32,
    "bf16_autocast": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class TeacherGeometry:
    """The frozen teacher up to its deepest tap. Bytes are those of its dtype, FLOPs and work of one micro-batch."""

    embedding_bytes: (
        int  # patch projection, tokens, position codes, and a tapped decoder or classifier: on every rank
    )
    block_bytes: tuple[int, ...]  # of every block that is built
    flops: int
    working_bytes: int  # alive at most while it runs, on top of the weights
    token_bytes: int  # [n, R + T, D_t]: what travels from stage to stage
    id_bytes: int  # [n, T] int64, beside it
    feature_bytes: int  # of all taps, as the student is given them

    @property
    def depth(self) -> int:
        return len(self.block_bytes)

    @property
    def weight_bytes(self) -> int:
        return self.embedding_bytes + sum(self.block_bytes)


@dataclass(frozen=True)
class EmaGeometry:
    """An objective's EMA teacher, whole and in fp32 on every rank; FLOPs and bytes of one micro-batch."""

    weight_bytes: int
    flops: int
    working_bytes: int  # alive at most while it runs, on top of the weights
    feature_bytes: int


@dataclass(frozen=True)
class Geometry:
    """A recipe at one micro-batch. `batch_bytes`: a prepared micro-batch without features, as it waits for the student."""

    micro_batch: int
    student: Trace
    student_parameters: int  # the encoder's alone
    buffer_bytes: int
    batch_bytes: int
    teacher: TeacherGeometry | None
    ema: EmaGeometry | None = None


def measure(config: RunConfig, micro_batch: int) -> Geometry:
    """Geometry of a recipe. Raises UserError for numbers that don't fit together, as training does."""
    objective, _ = build_objective(config, device="meta")
    dtype = WEIGHTS[config.precision]
    student = objective.student
    student_parameters = sum(parameter.numel() for parameter in student.parameters())
    built = None if config.teacher is None else _meta_teacher(config, objective)
    ids = torch.zeros(micro_batch, dtype=torch.int64)  # real ones: they key draws on the host
    ema = None if objective.ema is None else EmaModule(objective)
    objective.start_step(Progress(0, 1, 0.0, config.optim.epochs))
    autocast = (
        torch.autocast("cpu", torch.bfloat16)
        if config.precision == "bf16_autocast"
        else contextlib.nullcontext()
    )
    objective.to(dtype)
    with collectives.alone(), FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        batch, pixel_bytes = _batch(objective, config, ids)
        teacher, features = (
            (None, {})
            if built is None
            else _measure_teacher(*built, objective.taps, batch, sees=config.teacher.sees)
        )
        batch_bytes = _bytes(vars(batch).values()) + pixel_bytes
        ema_geometry = None
        if ema is not None:
            ema_geometry, found = _measure_ema(objective, ema, batch, precision=config.precision)
            features |= found

        def forward() -> torch.Tensor:
            with autocast:
                return objective(batch, features)["loss"]

        trace = trace_training(objective, forward)
    return Geometry(
        micro_batch,
        trace,
        student_parameters,
        _bytes(objective.buffers()),
        batch_bytes,
        teacher,
        ema_geometry,
    )


def scaled(geometry: Geometry, micro_batch: int) -> Geometry:
    """About the geometry at another micro-batch: all that is per image in proportion, without building anything."""

    def at(value: int) -> int:
        return round(value * micro_batch / geometry.micro_batch)

    student, teacher = geometry.student, geometry.teacher
    gradients = tuple(
        replace(gradient, before=at(gradient.before), after=at(gradient.after))
        for gradient in student.gradients
    )
    if teacher is not None:
        per_image = ("flops", "working_bytes", "token_bytes", "id_bytes", "feature_bytes")
        teacher = replace(teacher, **{name: at(getattr(teacher, name)) for name in per_image})
    ema = geometry.ema
    if ema is not None:
        ema = replace(
            ema, **{name: at(getattr(ema, name)) for name in ("flops", "working_bytes", "feature_bytes")}
        )
    student = Trace(at(student.forward_flops), at(student.backward_flops), gradients)
    return replace(
        geometry,
        micro_batch=micro_batch,
        student=student,
        batch_bytes=at(geometry.batch_bytes),
        teacher=teacher,
        ema=ema,
    )


def _batch(objective: Objective, config: RunConfig, ids: torch.Tensor) -> tuple[PatchBatch, int]:
    """What is on the device before teacher and student begin, and the bytes of the pictures and draws it was made of."""
    own = objective.student.grid[0] * objective.student.patch_size
    sizes = [view.size or own for view in objective.views]
    images, *more = (torch.zeros(len(ids), 3, size, size, dtype=torch.uint8) for size in sizes)
    labels = torch.zeros(len(ids), dtype=torch.int64)
    batch = Batch(
        images, torch.zeros(len(ids), objective.student.num_patches), labels, ids, ids, more_views=tuple(more)
    )
    return objective.prepare(batch, Normalize(config.data.mean, config.data.std)), _bytes(
        [*batch.views, batch.noise]
    )


def _measure_ema(
    objective: Objective, ema: EmaModule, batch: PatchBatch, *, precision: str
) -> tuple[EmaGeometry, dict[str, torch.Tensor]]:
    ema.to_empty(device="cpu")
    ema.state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in ema.state.items()}
    found: dict[str, torch.Tensor] = {}
    flops, working = trace_inference(
        lambda: found.update(ema_features(objective, ema, batch, precision=precision))
    )
    return EmaGeometry(_bytes(ema.state_dict().values()), flops, working, _bytes(found.values())), found


def _meta_teacher(config: RunConfig, objective: Objective) -> tuple[MaskedViT, Top | None]:
    """The teacher as far as it is needed, in its dtype, on the meta device."""
    name, overrides, taps = config.teacher.name, config.teacher.overrides(), objective.taps
    depth, decoder_depth = needed_depths(
        taps, meta_teacher(name, overrides).depth, config.teacher.decoder_depth
    )
    vit = meta_teacher(name, overrides, depth, keep_norm=needs_top(taps))
    norm, vit.norm = vit.norm, None
    top = meta_top(
        config.teacher, vit, norm, taps=taps, decoder_depth=decoder_depth, num_classes=objective.num_classes
    )
    rope, dtype = vit.rope, DTYPES[config.teacher.dtype]
    vit.to(dtype)
    vit.rope = rope  # angles stay in float32, as frozen.py leaves them
    return vit, None if top is None else top.to(dtype)


def _measure_teacher(
    vit: MaskedViT, top: Top | None, taps: tuple[str, ...], batch: PatchBatch, *, sees: str
) -> tuple[TeacherGeometry, dict[str, torch.Tensor]]:
    for part in (vit,) if top is None else (vit, top):
        part.to_empty(device="cpu")
    block_bytes = tuple(_bytes(block.state_dict().values()) for block in vit.blocks)
    statistics = {
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "teacher_mean": (0.0,) * 3,
        "teacher_std": (1.0,) * 3,
    }
    teacher = FrozenTeacher(vit, taps, None, view=PatchView(vit.patch_size, **statistics), sees=sees, top=top)
    found: dict[str, torch.Tensor] = {}
    flops, working = trace_inference(lambda: found.update(teacher.features(batch)))
    patches, ids = teacher.inputs(batch)
    with torch.no_grad():
        tokens = vit.embed(teacher.view(patches), ids)
    return TeacherGeometry(
        embedding_bytes=_bytes(vit.state_dict().values())
        - sum(block_bytes)
        + (0 if top is None else _bytes(top.state_dict().values())),
        block_bytes=block_bytes,
        flops=flops,
        working_bytes=working,
        token_bytes=_bytes([tokens]),
        id_bytes=_bytes([ids]),
        feature_bytes=_bytes(found.values()),
    ), found


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
