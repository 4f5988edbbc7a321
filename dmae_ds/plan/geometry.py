"""What a recipe's networks weigh, compute and hold for a micro-batch: the numbers that every placement is made of.

Built on the meta device by the very functions that training uses, then run once on fake tensors (trace.py).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dmae_ds.config.run import RunConfig
from dmae_ds.models.masking import MaskedBatch
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.mae import Mae
from dmae_ds.plan.trace import Trace, trace_inference, trace_training
from dmae_ds.teacher.frozen import DTYPES, FrozenTeacher, meta_teacher, needed_depths
from dmae_ds.teacher.grid import PatchView

WEIGHTS = {"fp32": torch.float32, "bf16_autocast": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherGeometry:
    """The frozen teacher up to its deepest tap. Bytes are those of its dtype, FLOPs and work of one micro-batch."""

    embedding_bytes: int  # patch projection, tokens, position codes: on every rank
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
class Geometry:
    """A recipe at one micro-batch. `batch_bytes`: a prepared micro-batch without features, as it waits for the student."""

    micro_batch: int
    student: Trace
    student_parameters: int  # the encoder's alone
    buffer_bytes: int
    batch_bytes: int
    teacher: TeacherGeometry | None
    decoder_is_tapped: bool


def measure(config: RunConfig, micro_batch: int) -> Geometry:
    """Geometry of a recipe. Raises UserError for numbers that don't fit together, as training does."""
    objective, _ = build_objective(config, device="meta")
    dtype = WEIGHTS[config.precision]
    student = objective.student
    student_parameters = sum(parameter.numel() for parameter in student.parameters())
    objective.to(dtype)
    vit = None if config.teacher is None else _meta_teacher(config, objective.taps)
    autocast = torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16_autocast" else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.to_empty(device="cpu")
        batch = _batch(objective, micro_batch)
        teacher, features = (None, {}) if vit is None else _measure_teacher(vit, objective.taps, batch, sees=config.teacher.sees)
        batch_bytes = _bytes(vars(batch).values()) + micro_batch * 3 * student.num_patches * student.patch_size**2 + 4 * micro_batch * student.num_patches

        def forward() -> torch.Tensor:
            with autocast:
                return objective(batch, features)["loss"]

        trace = trace_training(objective, forward)
    return Geometry(micro_batch, trace, student_parameters, _bytes(objective.buffers()), batch_bytes, teacher, _taps_decoder(objective.taps))


def scaled(geometry: Geometry, micro_batch: int) -> Geometry:
    """About the geometry at another micro-batch: all that is per image in proportion, without building anything."""

    def at(value: int) -> int:
        return round(value * micro_batch / geometry.micro_batch)

    student, teacher = geometry.student, geometry.teacher
    gradients = tuple(replace(gradient, before=at(gradient.before), after=at(gradient.after)) for gradient in student.gradients)
    if teacher is not None:
        per_image = ("flops", "working_bytes", "token_bytes", "id_bytes", "feature_bytes")
        teacher = replace(teacher, **{name: at(getattr(teacher, name)) for name in per_image})
    student = Trace(at(student.forward_flops), at(student.backward_flops), gradients)
    return replace(geometry, micro_batch=micro_batch, student=student, batch_bytes=at(geometry.batch_bytes), teacher=teacher)


def _batch(objective: Mae, micro_batch: int) -> MaskedBatch:
    """As `objective.prepare` would give it: what is on the device before teacher and student begin."""
    student, visible = objective.student, objective.num_visible
    patch = (student.patch_size, student.patch_size, 3)
    masked = student.num_patches - visible
    return MaskedBatch(
        visible=torch.empty(micro_batch, visible, *patch), masked=torch.empty(micro_batch, masked, *patch),
        ids_keep=torch.empty(micro_batch, visible, dtype=torch.int64), ids_masked=torch.empty(micro_batch, masked, dtype=torch.int64),
    )  # fmt: skip


def _meta_teacher(config: RunConfig, taps: tuple[str, ...]) -> MaskedViT:
    """The teacher as far as it is needed, in its dtype, on the meta device."""
    name, overrides = config.teacher.name, config.teacher.overrides()
    depth, decoder_depth = needed_depths(taps, meta_teacher(name, overrides).depth)
    vit = meta_teacher(name, overrides, depth, keep_norm=decoder_depth > 0)
    rope = vit.rope
    vit.to(DTYPES[config.teacher.dtype])
    vit.rope = rope  # angles stay in float32, as frozen.py leaves them
    return vit


def _measure_teacher(vit: MaskedViT, taps: tuple[str, ...], batch: MaskedBatch, *, sees: str) -> tuple[TeacherGeometry, dict[str, torch.Tensor]]:
    vit.to_empty(device="cpu")
    block_bytes = tuple(_bytes(block.state_dict().values()) for block in vit.blocks)
    statistics = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "teacher_mean": (0.0,) * 3, "teacher_std": (1.0,) * 3}
    # Taps of the decoder need the weights file to know its shape: the encoder alone is counted.
    taps = tuple(tap for tap in taps if tap.startswith("block/")) or (f"block/{vit.depth}",)
    teacher = FrozenTeacher(vit, taps, None, view=PatchView(vit.patch_size, **statistics), sees=sees)
    found: dict[str, torch.Tensor] = {}
    flops, working = trace_inference(lambda: found.update(teacher.features(batch)))
    patches, ids = teacher.inputs(batch)
    with torch.no_grad():
        tokens = vit.embed(teacher.view(patches), ids)
    return TeacherGeometry(
        embedding_bytes=_bytes(vit.state_dict().values()) - sum(block_bytes), block_bytes=block_bytes, flops=flops, working_bytes=working,
        token_bytes=_bytes([tokens]), id_bytes=_bytes([ids]), feature_bytes=_bytes(found.values()),
    ), found  # fmt: skip


def _taps_decoder(taps: tuple[str, ...]) -> bool:
    return any(tap.startswith("decoder/") for tap in taps)


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
