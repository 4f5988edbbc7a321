"""Schemas of the recipes that train a classifier: `dmae-ds eval finetune` and `dmae-ds eval linear`.

Where a run folder is evaluated, its network, data and seed stand below the recipe's: a recipe says only what differs.
Defaults are MAE's published ones for ViT-B (MAE, Tables 9 and 10); `launch/recipes/` holds them, and others', by name.
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

from dmae_ds.config.objectives import AugmentConfig, Section
from dmae_ds.config.run import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunSection,
    ScheduleConfig,
    Unit,
    known_format,
)


class ClassifierConfig(Section):
    """What both have: which weights, which labelled pictures, where the result goes."""

    run: RunSection
    weights: str  # a run folder or a weights file; the command's first word
    format: str = "auto"  # its key map: one of TEACHER_FORMATS, auto, or module:function
    network: ModelConfig
    data: DataConfig
    labels: str = "all"  # all, 1%, 10%, 5-shot: dmae_ds/evaluate/subsets.py
    subset_seed: NonNegativeInt | None = None
    pool: Literal["mean", "cls"] = "mean"  # what the classifier sees: the mean of the patch tokens, or CLS
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; weights stay in fp32

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        return known_format(value)


class FinetuneOptimConfig(OptimConfig):
    """AdamW with one rate a layer: lr * layer_decay^(depth + 1 - layer), the embedding being layer 0 and the head depth + 1."""

    global_batch: PositiveInt = 1024
    base_lr: PositiveFloat = 5e-4
    min_lr: NonNegativeFloat = 1e-6
    warmup_epochs: NonNegativeFloat = 5.0
    betas: tuple[Unit, Unit] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65


class DistillConfig(Section):
    """A fine-tuned classifier as teacher (DMAE, Table 4, third block): timm.task's losses beside the labels'."""

    # deit_soft, deit_hard: through a distillation token (DeiT, Sec. 4); logits: Hinton's; features: squared error of the pooled ones
    method: Literal["deit_soft", "deit_hard", "logits", "features"]
    teacher: (
        str  # a classifier's weights: best.safetensors of `eval finetune`, or another file with distill.name
    )
    name: str | None = None  # its timm name, where the file doesn't say: mae_finetuned_vit_large.pth
    format: str = "auto"
    pool: Literal["mean", "cls"] = "mean"  # of a file that doesn't say
    task_weight: NonNegativeFloat = 0.5  # of the labels' loss
    weight: PositiveFloat = 0.5  # of the teacher's
    temperature: PositiveFloat | None = None  # of deit_soft and logits

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        return known_format(value)

    @model_validator(mode="after")
    def _temperature_where_it_is_used(self):
        if (self.temperature is not None) != (self.method in ("deit_soft", "logits")):
            raise ValueError(
                f"distill.method {self.method} with temperature {self.temperature}; deit_soft and logits need one, the others have none"
            )
        return self


class FinetuneConfig(ClassifierConfig):
    """End-to-end fine-tuning, and supervised training with `init: random`."""

    init: Literal["weights", "random"] = "weights"  # random: the same network from scratch
    drop_path: Unit = 0.1  # of the last block; the first has none
    ema: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # decay a step; its weights are then those validated and kept
    )
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    augment: AugmentConfig = AugmentConfig()
    distill: DistillConfig | None = None

    @model_validator(mode="after")
    def _token_beside_cls(self):
        if self.distill is not None and self.distill.method.startswith("deit") and self.pool != "cls":
            raise ValueError(
                f"distill.method {self.distill.method} puts a distillation token beside CLS; set pool=cls"
            )
        return self


class LinearOptimConfig(ScheduleConfig):
    """LARS: a weight's rate is scaled by trust * |w| / |g|; nothing decays (MAE, Table 10)."""

    global_batch: PositiveInt = 16384
    base_lr: PositiveFloat = 0.1
    epochs: PositiveFloat = 90.0
    warmup_epochs: NonNegativeFloat = 10.0
    momentum: Unit = 0.9
    trust: PositiveFloat = 0.001


class LinearConfig(ClassifierConfig):
    """A linear classifier behind a batch norm without affine part; the network stays frozen."""

    pool: Literal["mean", "cls"] = "cls"
    optim: LinearOptimConfig = LinearOptimConfig()
