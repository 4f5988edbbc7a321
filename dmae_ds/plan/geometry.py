"""Bytes and FLOPs of a recipe's networks for a micro-batch, from which every placement is computed.

The networks are built on the meta device by the functions that training uses, then run once on fake tensors
(trace.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Iterable

import torch

from dmae_ds.config.networks import TeacherConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.config.teachers import taps_of
from dmae_ds.data.batch import DTYPES as PIXEL_DTYPES
from dmae_ds.data.batch import Batch
from dmae_ds.distributed import collectives
from dmae_ds.models.masking import PatchBatch
from dmae_ds.models.patches import Normalize
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import Objective
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.ema import EmaModule, ema_features
from dmae_ds.objectives.needs import Progress
from dmae_ds.plan.fake_cuda import fake_device, obstacle
from dmae_ds.plan.trace import Trace, trace_inference, trace_training
from dmae_ds.teacher.build import seen_patches
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, meta_teacher, needed_depths, needs_top
from dmae_ds.teacher.grid import PatchView
from dmae_ds.teacher.passes import TeacherPasses
from dmae_ds.teacher.several import SeveralTeachers
from dmae_ds.teacher.top import Top, meta_top

WEIGHTS = {
    "fp32": torch.float32,
    "bf16_autocast": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class TeacherGeometry:
    """The frozen teacher up to its deepest tap: bytes in its dtype, and work for one micro-batch."""

    # Patch projection, tokens, position codes, and a tapped decoder or classifier, which every rank holds.
    embedding_bytes: int
    block_bytes: tuple[int, ...]  # one number for each block
    flops: int
    working_bytes: int  # most bytes alive while it runs, on top of the weights
    token_bytes: int  # [N, R + T, D_t], sent from stage to stage
    id_bytes: int  # [N, T] int64, sent with the tokens
    # Features of all taps as the student gets them, or as they return to its rank, where that is more.
    feature_bytes: int
    kernels: int = 0  # that it launches for one micro-batch
    pass_flops: tuple[int, ...] = ()  # of each pass, where a family takes several
    products: str = "bf16"  # dtype of its matrix products: "fp32" or "bf16"

    @property
    def depth(self) -> int:
        return len(self.block_bytes)

    @property
    def weight_bytes(self) -> int:
        return self.embedding_bytes + sum(self.block_bytes)


@dataclass(frozen=True)
class EmaGeometry:
    """An objective's EMA teacher, whole and in fp32 on every rank: bytes, and work for one micro-batch."""

    weight_bytes: int
    flops: int
    working_bytes: int  # most bytes alive while it runs, on top of the weights
    feature_bytes: int
    kernels: int = 0
    follows: bool = True  # whether it is updated; a frozen copy of the initial weights is not


@dataclass(frozen=True)
class Geometry:
    """All networks of a recipe at one size of micro-batch.

    student: of a family all its students, which take turns; members: each by its name
    """

    micro_batch: int
    student: Trace
    student_parameters: int  # of the encoder only
    buffer_bytes: int
    batch_bytes: int  # a prepared micro-batch without features, as it waits for the student
    teachers: dict[str, TeacherGeometry]  # by name; the one teacher of a recipe has the name ""
    ema: EmaGeometry | None = None
    device_type: str = "cpu"  # whose kernels and autocast were measured
    members: dict[str, Trace] = field(default_factory=dict)
    pass_of: dict[str, int] = field(default_factory=dict)  # of the members with taps: the teacher's pass


def measure(config: RunConfig, micro_batch: int, *, device_type: str = "cpu") -> Geometry:
    """Measure a recipe. Raises UserError for numbers that don't fit together, as training does.

    device_type: "cpu" or "cuda", whether or not there is a GPU. Their kernels differ, and what their autocast
      keeps in fp32. Where torch cannot fake CUDA, a CPU's are measured, and the geometry says so.
    """
    if device_type == "cuda" and obstacle():
        device_type = "cpu"
    objective, _ = build_objective(config, device="meta")
    dtype = WEIGHTS[config.precision]
    student, members = objective.student, objective.members()
    student_parameters = sum(
        parameter.numel() for member in members.values() for parameter in member.student.parameters()
    )
    built = {
        name: meta_frozen_teacher(teacher, taps_of(name, objective.taps), num_classes=objective.num_classes)
        for name, teacher in config.named_teachers().items()
    }
    ids = torch.zeros(micro_batch, dtype=torch.int64)  # real tensors: they key draws on the host
    ema = None if objective.ema is None else EmaModule(objective)
    objective.start_step(Progress(0, 1, 0.0, config.optim.epochs))
    objective.to(dtype)
    with collectives.alone(), fake_device(device_type) as device:
        objective.to_empty(device=device)
        batch, pixel_bytes = _batch(objective, config, ids, device)
        teachers, features = {}, {}
        for name, teacher in config.named_teachers().items():
            teachers[name], own = _measure_teacher(
                *built[name],
                name,
                objective,
                batch,
                sees=seen_patches(teacher, student.num_patches),
                device=device,
            )
            features |= own
        batch_bytes = _batch_bytes(batch) + pixel_bytes
        ema_geometry = None
        if ema is not None:
            ema.to_empty(device=device)
            ema_geometry, ema_outputs = _measure_ema(objective, ema, batch, precision=config.precision)
            features |= ema_outputs
        autocast = contextlib.nullcontext()
        if config.precision == "bf16_autocast":
            autocast = torch.autocast(device_type, torch.bfloat16)

        def forward(member: Objective, batch: PatchBatch, features: dict[str, torch.Tensor]) -> torch.Tensor:
            with autocast:
                return member(batch, features)["loss"]

        traces = {}
        for name, inputs in objective.inputs_of(batch, features).items():
            traces[name] = trace_training(members[name], partial(forward, members[name], *inputs))
    first, *others = traces.values()
    geometry = Geometry(
        micro_batch,
        sum(others, first),
        student_parameters,
        _bytes(objective.buffers()),
        batch_bytes,
        teachers,
        ema_geometry,
        device_type,
        traces,
        objective.pass_of,
    )
    named = config.named_teachers().items()
    return with_stored_features(geometry, [name for name, one in named if one.placement == "cache"])


def with_stored_features(geometry: Geometry, names: Iterable[str]) -> Geometry:
    """The same recipe when features are read from a cache: these teachers have no blocks and no work."""
    nothing = {"embedding_bytes": 0, "block_bytes": (), "flops": 0, "working_bytes": 0, "kernels": 0}
    stored = {}
    for name in names:
        teacher = geometry.teachers[name]
        stored[name] = replace(teacher, **nothing, pass_flops=(0,) * len(teacher.pass_flops))
    return replace(geometry, teachers=geometry.teachers | stored)


def scaled(geometry: Geometry, micro_batch: int) -> Geometry:
    """Estimate the geometry at another micro-batch: everything that depends on images, in proportion."""

    def scale(value: int) -> int:
        return round(value * micro_batch / geometry.micro_batch)

    def scale_trace(trace: Trace) -> Trace:
        return replace(
            trace,
            forward_flops=scale(trace.forward_flops),
            backward_flops=scale(trace.backward_flops),
            gradients=tuple(
                replace(gradient, before=scale(gradient.before), after=scale(gradient.after))
                for gradient in trace.gradients
            ),
        )

    per_image = ("flops", "working_bytes", "token_bytes", "id_bytes", "feature_bytes")
    teachers = {
        name: replace(
            teacher,
            **{field: scale(getattr(teacher, field)) for field in per_image},
            pass_flops=tuple(map(scale, teacher.pass_flops)),
        )
        for name, teacher in geometry.teachers.items()
    }
    ema = geometry.ema
    if ema is not None:
        ema = replace(
            ema, **{name: scale(getattr(ema, name)) for name in ("flops", "working_bytes", "feature_bytes")}
        )
    return replace(
        geometry,
        micro_batch=micro_batch,
        student=scale_trace(geometry.student),
        members={name: scale_trace(trace) for name, trace in geometry.members.items()},
        batch_bytes=scale(geometry.batch_bytes),
        teachers=teachers,
        ema=ema,
    )


def _batch(
    objective: Objective, config: RunConfig, ids: torch.Tensor, device: torch.device
) -> tuple[PatchBatch, int]:
    """A prepared batch, and the bytes of the images and random draws that it is made from."""
    student_size = objective.student.grid[0] * objective.student.patch_size
    views = []
    for view in objective.views:
        size = view.size or student_size
        shape, dtype = (len(ids), objective.student.channels, size, size), PIXEL_DTYPES[config.data.bits]
        views.append(torch.zeros(shape, dtype=dtype, device=device))
    noise = torch.zeros(len(ids), objective.student.num_patches, device=device)
    labels = torch.zeros(len(ids), dtype=torch.int64, device=device)
    batch = Batch(views[0], noise, labels, ids, ids, more_views=tuple(views[1:]))
    normalize = Normalize(config.data.mean, config.data.std).to_empty(device=device)
    prepared = objective.prepare(batch, normalize)
    return prepared, _bytes([*batch.views, batch.noise])


def _measure_ema(
    objective: Objective, ema: EmaModule, batch: PatchBatch, *, precision: str
) -> tuple[EmaGeometry, dict[str, torch.Tensor]]:
    ema.state = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype, device=batch.visible.device)
        for name, tensor in ema.state.items()
    }
    features: dict[str, torch.Tensor] = {}
    flops, working, kernels = trace_inference(
        lambda: features.update(ema_features(objective, ema, batch, precision=precision))
    )
    weight_bytes = _bytes(ema.state_dict().values())
    follows = objective.ema.every != "never"
    return EmaGeometry(weight_bytes, flops, working, _bytes(features.values()), kernels, follows), features


def meta_frozen_teacher(
    config: TeacherConfig, taps: tuple[str, ...], *, num_classes: int | None
) -> tuple[MaskedViT, Top | None]:
    """Build the needed part of a teacher, in its dtype, on the meta device."""
    name, overrides = config.name, config.overrides()
    depth, decoder_depth = needed_depths(taps, meta_teacher(name, overrides).depth, config.decoder_depth)
    vit = meta_teacher(name, overrides, depth, keep_norm=needs_top(taps))
    norm, vit.norm = vit.norm, None
    top = meta_top(config, vit, norm, taps=taps, decoder_depth=decoder_depth, num_classes=num_classes)
    rope, dtype = vit.rope, DTYPES[config.dtype]
    vit.to(dtype)
    vit.rope = rope  # angles stay in float32, as frozen.py leaves them
    return vit, None if top is None else top.to(dtype)


def _measure_teacher(
    vit: MaskedViT,
    top: Top | None,
    name: str,
    objective: Objective,
    batch: PatchBatch,
    *,
    sees: str | int,
    device: torch.device,
) -> tuple[TeacherGeometry, dict[str, torch.Tensor]]:
    for part in (vit,) if top is None else (vit, top):
        part.to_empty(device=device)
    block_bytes = tuple(_bytes(block.state_dict().values()) for block in vit.blocks)
    zeros, ones = (0.0,) * vit.channels, (1.0,) * vit.channels
    view = PatchView(vit.patch_size, mean=zeros, std=ones, teacher_mean=zeros, teacher_std=ones)
    view.to_empty(device=device)
    teacher = FrozenTeacher(vit, taps_of(name, objective.taps), None, view=view, sees=sees, top=top)
    passes = objective.in_passes(SeveralTeachers({name: teacher}) if name else teacher)
    each = _passes_of(passes, name, batch)
    features: dict[str, torch.Tensor] = {}
    flops, working, kernels = trace_inference(lambda: features.update(passes.features(batch)))
    sent: list[tuple[torch.Tensor, torch.Tensor]] = []
    encoded: list[torch.Tensor] = []
    with torch.no_grad():
        for one, shown in each:
            if one is None:
                continue
            patches, ids = one.inputs(shown)
            sent.append((vit.embed(one.view(patches), ids), ids))
            encoded += one.encode(shown).values()
    top_bytes = 0 if top is None else _bytes(top.state_dict().values())
    geometry = TeacherGeometry(
        embedding_bytes=_bytes(vit.state_dict().values()) - sum(block_bytes) + top_bytes,
        block_bytes=block_bytes,
        flops=flops,
        working_bytes=working,
        token_bytes=_bytes(tokens for tokens, _ in sent),
        id_bytes=_bytes(ids for _, ids in sent),
        feature_bytes=max(_bytes(features.values()), _bytes(encoded)),
        kernels=kernels,
        pass_flops=tuple(0 if one is None else _pass_flops(one, shown) for one, shown in each),
        products="fp32" if sent[0][0].dtype == torch.float32 else "bf16",
    )
    return geometry, features


def _passes_of(
    passes: FrozenTeacher | SeveralTeachers | TeacherPasses, name: str, batch: PatchBatch
) -> list[tuple[FrozenTeacher | None, PatchBatch]]:
    """One teacher in each pass with the patches that it sees; None where the pass does not tap it."""
    each = passes.each(batch) if isinstance(passes, TeacherPasses) else [(passes, batch)]
    return [
        (one.teachers.get(name) if isinstance(one, SeveralTeachers) else one, shown) for one, shown in each
    ]


def _pass_flops(teacher: FrozenTeacher, shown: PatchBatch) -> int:
    return trace_inference(lambda: teacher.features(shown))[0]


def _batch_bytes(batch: PatchBatch) -> int:
    """Bytes of a prepared batch, of a family those of all its students; what two share counts once."""
    tensors, rest = {}, [batch]
    while rest:
        for value in vars(rest.pop()).values():
            if isinstance(value, torch.Tensor):
                tensors[id(value)] = value
            elif isinstance(value, dict | tuple):
                rest += value.values() if isinstance(value, dict) else value
    return _bytes(tensors.values())


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
