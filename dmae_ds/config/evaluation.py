"""Schemas of the recipes that train a classifier: `dmae-ds eval finetune` and `dmae-ds eval linear`.

Where a run folder is evaluated, its network, data and seed are used unless the recipe gives others. Defaults
are MAE's published ones for ViT-B (MAE, Tables 9 and 10); `launch/recipes/` has recipes for these and other
papers.
"""

from __future__ import annotations

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

from dmae_ds.config.data import DataConfig
from dmae_ds.config.networks import ModelConfig, known_format
from dmae_ds.config.objectives import AugmentConfig, Section
from dmae_ds.config.run import (
    OptimConfig,
    RunSection,
    ScheduleConfig,
    Unit,
    check_channels,
    check_is_rgb,
)


class WeightsConfig(Section):
    """What every evaluation has: a run folder or a weights file, its network, and a folder for the result."""

    run: RunSection  # its dir gets results.jsonl
    weights: str  # a run folder or a weights file; the command's first argument
    format: str = "auto"  # key map of the file: one of TEACHER_FORMATS, auto, or module:function
    network: ModelConfig

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        return known_format(value)


class FrozenConfig(WeightsConfig):
    """What an evaluation of frozen features reads: `data.train=... data.val=...` of `dmae-ds eval knn`."""

    data: DataConfig

    @model_validator(mode="after")
    def _nothing_is_repeated(self):
        if self.data.repeat > 1:
            raise ValueError(
                f"data.repeat {self.data.repeat} is for pre-training, and not used here; remove it"
            )
        return self

    @model_validator(mode="after")
    def _channels_agree(self):
        check_channels(self.data, self.network, "network")
        return self


class ClassifierConfig(FrozenConfig):
    """Options of both classifiers: the weights, the labelled images, and where the result goes."""

    labels: str = "all"  # all, 1%, 10%, 5-shot (dmae_ds/evaluate/subsets.py)
    subset_seed: NonNegativeInt | None = None  # draws the labelled images; null: 0, or none with all
    pool: Literal["mean", "cls"] = "mean"  # input of the classifier: the mean of the patch tokens, or CLS
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay in fp32
    tf32: bool = True  # fp32 matrix products on GPUs in TF32; false: exact


class FinetuneOptimConfig(OptimConfig):
    """AdamW with a learning rate for each layer: lr * layer_decay^(depth + 1 - layer).

    The embedding is layer 0, the head layer depth + 1.
    """

    global_batch: PositiveInt = 1024
    base_lr: PositiveFloat = 5e-4
    min_lr: NonNegativeFloat = 1e-6
    warmup_epochs: NonNegativeFloat = 5.0
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65


class CrdConfig(Section):
    """Contrastive representation distillation (CRD, Tian et al., ICLR 2020), against a memory of all images.

    The memory has one embedding of either network for each training image: 2 x images x dim numbers.
    """

    # An image's positive. exact: itself; relax: a random image of its class. Negatives are of other classes.
    positives: Literal["exact", "relax"] = "exact"
    num_negatives: PositiveInt = 16384  # for each image, drawn again in every epoch
    dim: PositiveInt = 128  # of both embeddings
    temperature: PositiveFloat = 0.07  # of the scores
    momentum: Unit = 0.5  # share of the old embedding that an image's new one leaves in the memory


class SrrlConfig(Section):
    """Softmax regression representation learning (SRRL, Yang et al., ICLR 2021)."""

    # linear: pooled features by a linear map and batch norm, as a ViT's targets may be negative; conv_relu:
    # patch tokens by a 1x1 convolution, batch norm and ReLU, then their mean (the published code).
    connector: Literal["linear", "conv_relu"] = "linear"
    logit_weight: NonNegativeFloat = 1.0  # weight of the squared error of the logits


class DistillConfig(Section):
    """Distillation from a fine-tuned classifier, next to the labels (DMAE, Table 4, third block).

    The losses of the first four methods are those of timm.task.
    """

    # deit_soft, deit_hard: by a distillation token (DeiT, Sec. 4); logits: Hinton's; features: squared error
    # of pooled features; crd: contrast with the embeddings of other images; srrl: pooled features, and the
    # logits that the teacher's classifier gives for them.
    method: Literal["deit_soft", "deit_hard", "logits", "features", "crd", "srrl"]
    # Weights of a classifier: best.safetensors of `dmae-ds eval finetune`, or another file together with
    # distill.name.
    teacher: str
    name: str | None = None  # timm name of the classifier, for files without it: mae_finetuned_vit_large.pth
    format: str = "auto"  # key map of the teacher's file
    pool: Literal["mean", "cls"] = "mean"  # input of the classifier, where the file doesn't have it
    task_weight: NonNegativeFloat = 0.5  # weight of the labels' loss
    weight: PositiveFloat = 0.5  # weight of the teacher's loss
    temperature: PositiveFloat | None = None  # for deit_soft and logits
    crd: CrdConfig | None = None  # settings of method crd
    srrl: SrrlConfig | None = None  # settings of method srrl

    @model_validator(mode="before")
    @classmethod
    def _its_own_section(cls, values):
        method = values.get("method") if isinstance(values, dict) else None
        if method in ("crd", "srrl") and values.get(method) is None:
            return {**values, method: {}}
        return values

    @model_validator(mode="after")
    def _no_section_of_another_method(self):
        for name in ("crd", "srrl"):
            if name != self.method and getattr(self, name) is not None:
                raise ValueError(
                    f"distill.{name} requires distill.method {name}, found {self.method}; leave it out, or "
                    f"set distill.method={name}"
                )
        return self

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        return known_format(value)

    @model_validator(mode="after")
    def _the_file_describes_itself(self):
        if self.name is None and (self.format, self.pool) != ("auto", "mean"):
            raise ValueError(
                f"distill.format {self.format} and distill.pool {self.pool} are for files that don't name "
                "their network; set distill.name too, or remove them"
            )
        return self

    @model_validator(mode="after")
    def _temperature_where_it_is_used(self):
        if (self.temperature is not None) != (self.method in ("deit_soft", "logits")):
            raise ValueError(
                f"distill.method {self.method} does not go with temperature {self.temperature}; "
                "deit_soft and logits require one, the others have none"
            )
        return self


class FinetuneConfig(ClassifierConfig):
    """End-to-end fine-tuning, and supervised training with `init: random`."""

    init: Literal["weights", "random"] = "weights"  # random: the same network from scratch
    drop_path: Unit = 0.1  # rate of the last block; rises linearly from 0 at the first
    # Decay of averaged weights in each step, which are then validated and saved; null: none.
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    augment: AugmentConfig = AugmentConfig()
    distill: DistillConfig | None = None

    @model_validator(mode="after")
    def _rand_augment_is_of_rgb(self):
        if self.augment.rand_augment is not None:
            check_is_rgb(self.data, "augment.rand_augment")
        return self

    @model_validator(mode="after")
    def _token_requires_cls(self):
        if self.distill is not None and self.distill.method.startswith("deit") and self.pool != "cls":
            raise ValueError(
                f"distill.method {self.distill.method} has a distillation token and requires pool=cls, "
                f"found {self.pool}"
            )
        return self

    @model_validator(mode="after")
    def _memory_is_of_single_images(self):
        if self.distill is not None and self.distill.method == "crd" and self.augment.mixes:
            raise ValueError(
                "distill.method crd remembers each image's embedding, but augment.mixup "
                f"{self.augment.mixup:g} and augment.cutmix {self.augment.cutmix:g} mix two images; set "
                "augment.mixup=0 augment.cutmix=0"
            )
        return self


class LinearOptimConfig(ScheduleConfig):
    """LARS without weight decay: a weight's learning rate is scaled by trust * |w| / |g| (MAE, Table 10)."""

    global_batch: PositiveInt = 16384
    base_lr: PositiveFloat = 0.1
    epochs: PositiveFloat = 90.0
    warmup_epochs: NonNegativeFloat = 10.0
    momentum: Unit = 0.9  # of the update
    trust: PositiveFloat = 0.001  # LARS's coefficient


class LinearConfig(ClassifierConfig):
    """A linear classifier on a frozen network, behind a batch norm without weights."""

    pool: Literal["mean", "cls"] = "cls"
    optim: LinearOptimConfig = LinearOptimConfig()
