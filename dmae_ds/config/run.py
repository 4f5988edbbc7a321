"""Root schema of a recipe. `launch/recipes/*.yaml` hold only what differs from these defaults.

The defaults are MAE's pre-training recipe as DMAE uses it (DMAE, Sec. 4.1): AdamW, base lr 1.5e-4, weight
decay .05, betas .9/.95, batch 4096, 100 epochs with 20 of warm-up, cosine, no clipping.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from dmae_ds.config.data import DataConfig, TrainingDataConfig
from dmae_ds.config.family import MemberConfig, check_family, key_of, members_of, objectives_of
from dmae_ds.config.networks import ModelConfig, NamedTeacherConfig, StudentConfig, TeacherConfig
from dmae_ds.config.objectives import ObjectiveConfig, Section
from dmae_ds.config.teachers import check_one_or_several, name_teachers, warn_of_few_patches, why_not_served
from dmae_ds.errors import UserError

Unit = Annotated[float, Field(ge=0, lt=1)]


class RunSection(Section):
    """The run's folder, and the seed of everything random."""

    dir: str  # the run folder; with several nodes on a file system that all of them share
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0  # of weights, order, crops and masks
    # Deterministic kernels, with which a GPU repeats a run bit for bit, more slowly; CPUs do so without.
    deterministic: bool = False


class ScheduleConfig(Section):
    """Batch and learning rate: base_lr * global_batch / 256, linear warm-up, half a cosine to min_lr."""

    global_batch: PositiveInt = 4096  # images of an optimizer step, over all ranks
    # Most images of a rank at once; null: its share, but on GPUs `dmae-ds train` takes what fits.
    micro_batch: PositiveInt | None = None
    base_lr: PositiveFloat = 1.5e-4  # learning rate of 256 images; the peak is base_lr * global_batch / 256
    min_lr: NonNegativeFloat = 0.0  # learning rate at the end
    epochs: PositiveFloat = 100.0  # length of the run, in passes over data.train; may be a fraction
    warmup_epochs: NonNegativeFloat = 20.0  # linear rise of the learning rate from 0, part of epochs

    @model_validator(mode="after")
    def _warmup_ends(self):
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} is not below epochs {self.epochs:g}; "
                "shorten the warm-up or train longer"
            )
        return self


class OptimConfig(ScheduleConfig):
    """AdamW with its schedule."""

    weight_decay: NonNegativeFloat = 0.05  # of matrices; biases and norms have none
    betas: tuple[Unit, Unit] = (0.9, 0.95)  # of Adam's moments
    # Learning rate of a layer divided by that of the layer above it; below 1 only for objectives that know
    # their layers.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_grad: NonNegativeFloat = 0.0  # limit of the global gradient norm; 0: no clipping, as MAE


class CheckpointConfig(Section):
    """When to save, and how many saves to keep. The end of a run is always saved."""

    every_steps: PositiveInt | None = None  # save after so many steps; null: by time alone
    # Save after so many minutes, and for the first time after 5 at the latest; null: by steps alone.
    every_minutes: PositiveFloat | None = 30.0
    keep: PositiveInt = 3  # newest saves that stay


class LogConfig(Section):
    """How often losses are read from the device, and the trackers that they are sent to."""

    every_steps: PositiveInt = 20  # steps between two reads of the losses
    trackers: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"])  # []: metrics.jsonl alone
    # Project of W&B, where the run has the name of its folder; null: WANDB_PROJECT, otherwise dmae-ds.
    project: str | None = None

    @model_validator(mode="after")
    def _the_project_is_used(self):
        if self.project is not None and "wandb" not in self.trackers:
            raise ValueError("log.project requires log.trackers=[wandb]; set that too, or remove log.project")
        return self


class DistConfig(Section):
    """How ranks notice that one of them is lost (dmae_ds/distributed/heartbeat.py)."""

    # Longest wait for a rank, in any collective; more than the slowest save, and at most a year.
    timeout_s: Annotated[float, Field(gt=0, le=31_536_000)] = 600.0


class EvalConfig(Section):
    """Measurements during training: losses on data.val, and k-NN as `eval knn` and `eval dense` measure it.

    They are off unless loss_every, knn_every and dense_every are set. k-NN costs one pass of the student,
    without gradients, over the labelled images of data.train and over data.val; the losses need no labels.
    """

    # Epochs between measurements of the objective's losses on data.val, and at the end of the run
    # (dmae_ds/train/val_loss.py). Not for objectives with an EMA teacher.
    loss_every: PositiveFloat | None = None
    knn_every: PositiveFloat | None = None  # epochs, as optim.epochs; the end of the run is measured too
    # The initial student too, with which a run that continues a backbone is compared.
    knn_at_start: bool = False
    knn_k: PositiveInt = 20  # number of neighbours
    knn_temperature: PositiveFloat = 0.07  # of a neighbour's weight exp(cosine / temperature)
    knn_pool: Literal["mean", "cls"] = "mean"  # the feature: mean of the patch tokens, or CLS
    # Training images that vote: all, 10%, 5-shot (dmae_ds/evaluate/subsets.py, seed 0). 10% costs about a
    # tenth.
    knn_labels: str = "all"
    batch_size: PositiveInt = 64  # images that a rank embeds at once for k-NN of whole images
    memory_gib: PositiveFloat = 1.0  # for the search, beyond the features
    # Epochs between measurements of dense k-NN (dmae_ds/evaluate/dense_knn.py), and at the end of the run.
    dense_every: PositiveFloat | None = None
    dense_train: str | None = None  # shards with label maps, whose patches vote; null: data.train
    dense_val: str | None = None  # shards with label maps that are segmented; null: data.val
    dense_k: PositiveInt = 30  # number of neighbours
    dense_patches: PositiveInt = 1_024_000  # patches that vote, equally many of each image, at least one
    dense_size: NonNegativeInt | None = None  # px of an image's short side, 0: as stored; null: 32 patches

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        for name, field in type(self).model_fields.items():
            if name in ("loss_every", "knn_every", "dense_every") or getattr(self, name) == field.default:
                continue
            if name == "memory_gib":
                needs, met = "knn_every or eval.dense_every", (self.knn_every or self.dense_every)
            elif name.startswith("dense_"):
                needs, met = "dense_every", self.dense_every
            else:
                needs, met = "knn_every", self.knn_every
            if met is None:
                raise ValueError(f"eval.{name} requires eval.{needs}; set that too, or remove eval.{name}")
        return self


def check_channels(data: DataConfig, network: ModelConfig, section: str) -> None:
    """Raise ValueError unless images and network have the same number of channels."""
    if len(data.mean) != (network.in_chans or 3):
        raise ValueError(
            f"{section}.in_chans is {network.in_chans or 3}, and data.mean has {len(data.mean)} numbers, one "
            "a channel; make them agree (`dmae-shards info DST --mean-std` prints data.mean and data.std)"
        )


def check_is_rgb(data: DataConfig, key: str) -> None:
    """Raise ValueError where colours are to be changed of images that have none, or other numbers."""
    if len(data.mean) != 3 or data.bits != 8:
        raise ValueError(
            f"{key} changes colours of 8-bit RGB, and images have {len(data.mean)} channels of {data.bits} "
            f"bits; set {key} to false or null"
        )


class RunConfig(Section):
    """A whole recipe. `RUN/config.yaml` is one with all defaults written out."""

    run: RunSection
    student: StudentConfig | None = None
    # Several students by name, instead of `student`, which share images, masks and the teacher's features.
    students: dict[str, MemberConfig] | None = None
    teacher: TeacherConfig | None = None
    # Several teachers by name, instead of `teacher`, for objectives that take them; taps are `name:block/18`.
    teachers: dict[str, NamedTeacherConfig] | None = None
    objective: ObjectiveConfig | None = None
    data: TrainingDataConfig
    optim: OptimConfig = OptimConfig()
    # bf16, fp16: DeepSpeed's engines with fp32 master weights; bf16_autocast: fp32 weights, bf16 matrix
    # products.
    precision: Literal["fp32", "bf16", "bf16_autocast", "fp16"] = "fp32"
    compile: bool = False  # torch.compile for each block of student, decoder and teacher
    # fp32 matrix products on GPUs in TF32, which keeps 10 bits of a mantissa; false: exact, and slow.
    tf32: bool = True
    # Linear layers in fp32 on CPUs. auto: oneDNN where it is clearly faster than torch
    # (dmae_ds/models/onednn.py).
    linear: Literal["auto", "torch", "onednn"] = "auto"
    deepspeed: str = "zero1"  # name of a file in ds_configs/, or the path of your own JSON
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    dist: DistConfig = DistConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, values: object) -> object:
        if isinstance(values, dict):
            check_one_or_several(values)  # first, or a key of the wrong section would ask for its `name`
        return values

    @model_validator(mode="after")
    def _teachers_have_names(self):
        if self.teachers is not None:
            name_teachers(self.teachers)
        return self

    @model_validator(mode="after")
    def _teachers_follow_the_precision(self):
        dtype = "bf16" if self.precision == "bf16_autocast" else self.precision
        for key, value in self._teacher_fields(
            {
                name: teacher.following(dtype) if teacher.dtype == "auto" else teacher
                for name, teacher in self.named_teachers().items()
            }
        ).items():
            object.__setattr__(self, key, value)  # values are final to others
        return self

    def named_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by name, in the same order on every rank; the one teacher has the name ""."""
        if self.teacher is not None:
            return {"": self.teacher}
        return dict(sorted((self.teachers or {}).items()))

    def with_teachers(self, teachers: dict[str, TeacherConfig]) -> RunConfig:
        """The same recipe with other sections of the same teachers, as `named_teachers` gives them."""
        return self.model_copy(update=self._teacher_fields(teachers))

    def _teacher_fields(self, teachers: dict[str, TeacherConfig]) -> dict[str, object]:
        if not teachers:
            return {}
        return {"teacher": teachers[""]} if "" in teachers else {"teachers": teachers}

    @model_validator(mode="after")
    def _objectives_fit_into_the_run(self):
        check_family(self)
        for name, member in members_of(self).items():
            objective, student = member.objective, member.student
            objective.check_epochs(self.optim.epochs)
            objective.check_batch(self.optim.global_batch)
            if objective.needs_student_weights and student.weights is None:
                raise ValueError(
                    f"objective.name {objective.name} continues a trained student; give "
                    f"{key_of(name, 'weights')}: a run folder, a weights file or a hub id"
                )
            check_channels(self.data, student, key_of(name, "")[:-1])
            if getattr(objective, "photometric", False):
                check_is_rgb(self.data, "objective.photometric")
        return self

    def check_teacher(self) -> None:
        """Raise UserError where the objective lacks the teacher it needs, or has one it doesn't use."""
        teachers, objectives = self.named_teachers(), objectives_of(self)
        needy = {objective.name: objective for objective in objectives if objective.needs_teacher}
        if needy and not teachers:
            name = next(iter(needy))
            raise UserError(f"objective {name} needs a teacher; give teacher.name and teacher.weights")
        if teachers and not needy:
            names = ", ".join(dict.fromkeys(objective.name for objective in objectives))
            raise UserError(
                f"objective {names} does not use a teacher; remove the teacher section, or choose another "
                "objective.name"
            )
        one = next((name for name in needy if not needy[name].takes_several_teachers), None)
        if self.teachers is not None and one is not None:
            raise UserError(
                f"objective {one} takes one teacher, and the recipe has teachers {', '.join(teachers)}; "
                "give one of them as `teacher`, or choose another objective.name, such as features"
            )
        taps = tuple(tap for objective in objectives for tap in objective.tapped)
        problem = why_not_served(taps, teachers) if taps else ""
        if problem:
            raise UserError(f"objective.targets: {problem}")
        for teacher in teachers.values():
            if (teacher.in_chans or 3) != len(self.data.mean):
                raise UserError(
                    f"{teacher.key('in_chans')} is {teacher.in_chans or 3} and student.in_chans "
                    f"{len(self.data.mean)}; a teacher sees the student's images: set both to the same number"
                )

    def teacher_warning(self) -> str | None:
        """A warning where teachers that were trained on whole images see few patches; None elsewhere."""
        drops = any(objective.needs_teacher and objective.dropped_share for objective in objectives_of(self))
        return warn_of_few_patches(self.named_teachers().values()) if drops else None
