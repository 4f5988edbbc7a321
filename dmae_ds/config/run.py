"""The root schema of a recipe. `launch/recipes/*.yaml` hold only what differs from the defaults written here.

Defaults are MAE's pre-training recipe as DMAE runs it (DMAE, Sec. 4.1): AdamW, base lr 1.5e-4, weight decay .05,
betas .9/.95, batch 4096, 100 epochs with 20 of warm-up, cosine, no clipping.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from dmae_ds.config.objectives import ObjectiveConfig, Section
from dmae_ds.errors import UserError

Unit = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """A timm vision transformer by name; the other keys replace timm's own numbers."""

    name: str
    img_size: PositiveInt | None = None
    patch_size: PositiveInt | None = None
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    mlp_ratio: PositiveFloat | None = None

    def overrides(self) -> dict:
        """The keys that were set, as `timm.create_model` takes them."""
        keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


class StudentConfig(ModelConfig):
    """The network that is trained, from random weights or from those of an earlier run."""

    weights: str | None = None  # a run folder, or a file of any of TEACHER_FORMATS; null: drawn from run.seed


TEACHER_FORMATS = (
    "timm",
    "mae",
    "hf",
    "dinov2",
    "dinov3",
    "dmae_ds",
)  # explained in dmae_ds/weights/formats.py
IMPORT_PATH = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def known_format(value: str) -> str:
    """The name of a key map, as it was given. Raises ValueError for one that can't be."""
    if value not in (*TEACHER_FORMATS, "auto") and not re.fullmatch(IMPORT_PATH, value):
        near = get_close_matches(value, TEACHER_FORMATS, n=1)
        raise ValueError(
            f"'{value}' is unknown; {f'did you mean {near[0]}? ' if near else ''}choose {', '.join(TEACHER_FORMATS)}, auto, or module:function"
        )
    return value


def looks_like_hub_id(weights: str) -> bool:
    """`owner/name`, which a path of a weights file never is."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights)) and not weights.endswith(
        (".safetensors", ".pth", ".pt", ".bin", ".json")
    )


class TeacherConfig(ModelConfig):
    """A frozen vision transformer and where its weights come from: a file of yours, or timm's pretrained ones.

    `name` may also be `module:function` of your own, which returns a timm VisionTransformer or Eva.
    """

    weights: str | None = (
        None  # a file, an index of parts, a folder, or a hub id such as facebook/vit-mae-large
    )
    pretrained: bool = False  # the weights that timm knows under a tagged name: vit_large_patch16_224.mae
    format: str = (
        "timm"  # one of TEACHER_FORMATS; auto, where exactly one fits; or module:function of your own
    )
    dtype: Literal["fp32", "bf16", "fp8"] = (
        "fp32"  # fp8: matrix products in float8, by torchao (dmae_ds/teacher/fp8.py)
    )
    # visible: the student's patches, as masked autoencoders were trained; all: the whole picture, for teachers that never
    # met dropped tokens. The loss takes the student's patches either way.
    sees: Literal["visible", "all"] = "visible"
    # Pixel statistics that the teacher was trained with; null: those of the tag in its name, else data.mean and data.std.
    mean: tuple[float, float, float] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    # replicated: every rank holds the needed blocks; pipeline: `stages` consecutive ranks hold them between them;
    # zero3: every rank holds a share of every block and fetches it when it is run; auto: what `dmae-ds plan` finds fastest.
    placement: Literal["replicated", "pipeline", "zero3", "auto"] = "replicated"
    stages: PositiveInt | None = None
    # A masked autoencoder's decoder, where the objective taps it. No file says how many heads it has; the rest is held against the file.
    decoder_depth: PositiveInt = 8
    decoder_embed_dim: PositiveInt = 512
    decoder_num_heads: PositiveInt = 16
    pool: Literal["mean", "cls"] = (
        "mean"  # what a classifier sees, where the objective taps its logits: the patch tokens' mean, or CLS
    )
    # What its features are turned into before they are compared: zscore and phi_s need `dmae-ds teacher stats` once.
    standardize: Literal["none", "layer_norm", "zscore", "phi_s"] = "none"
    stats: str | None = None  # the file of `dmae-ds teacher stats`; null: beside the weights
    license: str | None = (
        None  # of its weights, for the cards of exports, where timm or a card beside the weights doesn't say it: cc-by-nc-4.0
    )

    @model_validator(mode="after")
    def _weights_from_one_place(self):
        if self.pretrained == (self.weights is not None):
            raise ValueError(
                "give either teacher.weights, or teacher.pretrained=true with a tagged name such as vit_large_patch16_224.mae"
            )
        if self.pretrained and ("." not in self.name or self.format != "timm"):
            raise ValueError(
                f"teacher.pretrained needs a name with timm's tag, such as vit_large_patch16_224.mae, and format timm; found {self.name}, {self.format}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError("give both teacher.mean and teacher.std, or neither")
        if (self.placement == "pipeline") != (self.stages is not None):
            raise ValueError(
                f"teacher.placement {self.placement} with teacher.stages {self.stages}; a pipeline needs a number of stages, and nothing else has one"
            )
        if self.dtype == "fp8" and self.placement != "replicated":
            raise ValueError(
                f"teacher.dtype fp8 works with teacher.placement replicated alone, found {self.placement}; set that, or teacher.dtype=bf16"
            )
        if self.stats is not None and self.standardize not in ("zscore", "phi_s"):
            raise ValueError(
                f"teacher.stats is of no use to standardize {self.standardize}; set teacher.standardize=zscore or phi_s, or remove it"
            )
        return self

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        return known_format(value)


class RunSection(Section):
    """Where the run lives, and the one seed that everything random is keyed by."""

    dir: str
    seed: NonNegativeInt = 0


class DataConfig(Section):
    """Shard folders written by `dmae-shards make`, here or behind a URL, how they are read, and what happens to a picture."""

    train: str
    val: str | None = None
    num_workers: NonNegativeInt = 8
    # Samples read in one go: 1 is an exact global shuffle; 16 or 64 for URLs and spinning disks (dmae_ds/data/order.py).
    block: Annotated[int, Field(ge=1, le=4096)] = 1
    # Crops, each with a mask of its own, that are taken of a picture once it is decoded (MAE for video: repeated sampling).
    # Epochs and steps count crops, so with 4 a picture is decoded every fourth epoch.
    repeat: PositiveInt = 1
    buffer_gib: PositiveFloat = 8.0  # with blocks: what the workers of a rank may hold of them
    # Corrupt samples that are replaced and written into RUN/corrupt.jsonl before a run stops: a run of days should not end
    # for one bad picture, and a hundred are a bad disk. 0: the first one stops it.
    max_corrupt: NonNegativeInt = 100
    retries: NonNegativeInt = 8  # of a request to a URL, after .1, .2, .4 ... 10 seconds
    timeout_s: PositiveFloat = 30.0  # of one request
    cache_dir: str | None = None  # a folder on a local disk that keeps what URLs gave
    cache_gib: PositiveFloat = 50.0  # its bound, for all processes of a node together
    # Tars without an index are streamed if this says how long an epoch is; `dmae-shards index` is better.
    num_samples: PositiveInt | None = None
    shuffle_buffer: PositiveInt = 5000  # of a worker that streams
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.2, 1.0)
    flip: bool = True
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.875  # evaluation: central share of the short side
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _scale_is_a_range(self):
        low, high = self.crop_scale
        if not low <= high <= 1:
            raise ValueError(
                f"crop_scale [{low:g}, {high:g}] is not a range of area shares; give 0 < low <= high <= 1"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        for name, needs, met in (
            ("buffer_gib", "data.block above 1", self.block > 1),
            ("cache_gib", "data.cache_dir", self.cache_dir is not None),
            ("shuffle_buffer", "data.num_samples", self.num_samples is not None),
        ):
            if getattr(self, name) != defaults[name] and not met:
                raise ValueError(f"data.{name} is of no use without {needs}; set that too, or remove it")
        if self.num_samples is not None and self.repeat > 1:
            raise ValueError(
                "data.repeat works with indexed shards alone, and data.num_samples is for tars without an index; remove one of the two (`dmae-shards index` makes one)"
            )
        return self


class ScheduleConfig(Section):
    """A batch and its rate: lr = base_lr * global_batch / 256, linear warm-up, half a cosine down to min_lr."""

    global_batch: PositiveInt = 4096
    micro_batch: PositiveInt | None = None  # images a rank sees at once, at most; null: global_batch / ranks
    base_lr: PositiveFloat = 1.5e-4
    min_lr: NonNegativeFloat = 0.0
    epochs: PositiveFloat = 100.0
    warmup_epochs: NonNegativeFloat = 20.0

    @model_validator(mode="after")
    def _warmup_ends(self):
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} is not below epochs {self.epochs:g}; shorten the warm-up or train longer"
            )
        return self


class OptimConfig(ScheduleConfig):
    """AdamW and its schedule."""

    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[Unit, Unit] = (0.9, 0.95)
    # Rate of a layer over that of the one above it; 1: all alike. For objectives that say which layer a parameter is of.
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_grad: NonNegativeFloat = 0.0  # global gradient norm; 0: never clipped, as MAE


class CheckpointConfig(Section):
    """When to save, and how many saves to keep. The end of a run is always saved."""

    every_steps: PositiveInt | None = None
    every_minutes: PositiveFloat | None = 30.0
    keep: PositiveInt = 3


class LogConfig(Section):
    """How often losses are read off the device, and who else is told."""

    every_steps: PositiveInt = 20
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]


class DistConfig(Section):
    """How ranks look after each other (dmae_ds/distributed/heartbeat.py)."""

    timeout_s: PositiveFloat = (
        600.0  # that anybody waits for a rank, in any collective; longer than the slowest save
    )


class EvalConfig(Section):
    """k-NN of the student while it is trained, as `dmae-ds eval knn` measures it; off, unless knn_every is set.

    Each time costs one pass of the student, without gradients, over the labelled pictures of data.train and over data.val.
    """

    knn_every: PositiveFloat | None = None  # epochs, as optim.epochs; the end of the run is measured too
    knn_k: PositiveInt = 20
    knn_temperature: PositiveFloat = 0.07
    knn_pool: Literal["mean", "cls"] = "mean"
    knn_labels: str = (
        "all"  # training pictures that vote: 10% costs about a tenth (dmae_ds/evaluate/subsets.py; seed 0)
    )
    batch_size: PositiveInt = 64  # pictures a rank embeds at once
    memory_gib: PositiveFloat = 1.0  # for the search, beyond the features

    @model_validator(mode="after")
    def _nothing_is_ignored(self):
        if self.knn_every is None and self.model_fields_set - {"knn_every"} and self != EvalConfig():
            changed = next(
                name
                for name in type(self).model_fields
                if getattr(self, name) != type(self).model_fields[name].default
            )
            raise ValueError(
                f"eval.{changed} is of no use without eval.knn_every; set that too, or remove it"
            )
        return self


class RunConfig(Section):
    """One run, whole. Written to `RUN/config.yaml` as it was resolved."""

    run: RunSection
    student: StudentConfig
    teacher: TeacherConfig | None = None
    objective: ObjectiveConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    # fp32; bf16 and fp16: DeepSpeed's engines with fp32 masters; bf16_autocast: fp32 weights, bf16 matrix products.
    precision: Literal["fp32", "bf16", "bf16_autocast", "fp16"] = "fp32"
    compile: bool = (
        False  # torch.compile for the blocks of student, decoder and teacher (dmae_ds/models/compiled.py)
    )
    # Linear layers in fp32 on CPUs: auto tries oneDNN against torch and takes the clearly faster one (dmae_ds/models/onednn.py).
    linear: Literal["auto", "torch", "onednn"] = "auto"
    deepspeed: str = "zero2"  # a file of ds_configs/ by name, or the path of your own JSON
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    dist: DistConfig = DistConfig()

    @model_validator(mode="after")
    def _objective_fits_into_the_run(self):
        self.objective.check_epochs(self.optim.epochs)
        return self

    def check_teacher(self) -> None:
        """Raise UserError where an objective lacks the teacher that it needs, or has one that it doesn't use."""
        name = self.objective.name
        if self.objective.needs_teacher and self.teacher is None:
            raise UserError(f"objective {name} needs a teacher; give teacher.name and teacher.weights")
        if self.teacher is not None and not self.objective.needs_teacher:
            raise UserError(
                f"objective {name} does not use a teacher; remove the teacher section, or choose another objective.name"
            )
