"""Sections of a recipe that name a network: the student, and the frozen teacher."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)

from dmae_ds.config.objective_base import Section


class ModelConfig(Section):
    """A timm vision transformer by name; the other keys replace timm's numbers."""

    name: str  # timm's name, such as vit_base_patch16_224
    img_size: PositiveInt | None = None  # px, of a square image; null, here and below: that of the name
    patch_size: PositiveInt | None = None  # px
    embed_dim: PositiveInt | None = None  # width of a token
    depth: PositiveInt | None = None  # number of blocks
    num_heads: PositiveInt | None = None  # attention heads of a block
    mlp_ratio: PositiveFloat | None = None  # width of the MLP's hidden layer, in multiples of embed_dim
    in_chans: PositiveInt | None = None  # channels of an image; null: 3

    def overrides(self) -> dict:
        """Keyword arguments for `timm.create_model`: the keys that were set."""
        keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "in_chans")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


class StudentConfig(ModelConfig):
    """The network that is trained, from random weights or from those of an earlier run or a released file.

    Any timm VisionTransformer or Eva, as a teacher: also with registers, layer scale, rotary or learned
    positions, which then are the family's (dmae_ds/models/vit.py, build_student).
    """

    weights: str | None = None  # a run folder, or a file in one of TEACHER_FORMATS; null: random, by run.seed
    # Activation checkpointing: backward runs each block of the student and of its decoder a second time. A
    # third more work, and a fraction of the activations (`dmae-ds plan` counts both).
    checkpoint_blocks: bool = False


TEACHER_FORMATS = ("timm", "mae", "hf", "dinov2", "dinov3", "dmae_ds")  # see dmae_ds/weights/formats.py
IMPORT_PATH = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def known_format(value: str) -> str:
    """Return the name of a key map unchanged. Raises ValueError for a name that can't be one."""
    if value not in (*TEACHER_FORMATS, "auto") and not re.fullmatch(IMPORT_PATH, value):
        near = get_close_matches(value, TEACHER_FORMATS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        choices = ", ".join(TEACHER_FORMATS)
        raise ValueError(f"'{value}' is unknown; {hint}choose {choices}, auto, or module:function")
    return value


def looks_like_hub_id(weights: str) -> bool:
    """Whether the name is `owner/name`, and can't be the path of a weights file."""
    suffixes = (".safetensors", ".pth", ".pt", ".bin", ".json")
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights)) and not weights.endswith(suffixes)


class TeacherConfig(ModelConfig):
    """A frozen vision transformer with weights from a file, from the hub, or from timm.

    `name` may also be `module:function` of your own that returns a timm VisionTransformer or Eva.
    """

    # A file, an index of parts, a folder, or a hub id such as facebook/vit-mae-large.
    weights: str | None = None
    pretrained: bool = False  # the weights that timm has for a tagged name: vit_large_patch16_224.mae
    # One of TEACHER_FORMATS; auto: the only one that fits; or module:function of your own.
    format: str = "timm"
    # auto: the recipe's precision (bf16_autocast: bf16), or what it was when a resumed run began.
    # fp8: matrix products in float8, by torchao (dmae_ds/teacher/fp8.py).
    dtype: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    # visible: the student's patches, as masked autoencoders were trained; all: the whole image, for teachers
    # that were not trained with dropped tokens. The loss takes the student's patches either way.
    # superset: more patches than the student, the student's among them, for objectives that compare them too.
    sees: Literal["visible", "all", "superset"] = "visible"
    # Share of the patches that is masked for the teacher, with sees superset: below the student's.
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    # Pixel statistics that the teacher was trained with; null: those of the tag in its name, else data.mean
    # and data.std.
    mean: tuple[float, ...] | None = None  # one number a channel
    std: tuple[PositiveFloat, ...] | None = None  # goes with mean
    # replicated: every rank holds the needed blocks; pipeline: `stages` consecutive ranks share them, whole
    # blocks each; zero3: every rank holds a part of every block and fetches a block when it runs; auto: the
    # fastest by `dmae-ds plan`; cache: no network, its features are read from `cache`.
    placement: Literal["replicated", "pipeline", "zero3", "cache", "auto"] = "replicated"
    stages: PositiveInt | None = None  # ranks that share one teacher; with placement pipeline
    # What `dmae-ds teacher cache` wrote, a folder or URL; with placement cache, which needs no `weights`.
    cache: str | None = None
    # Decoder of a masked autoencoder, where the objective taps it. Depth and width are compared with the
    # file; the number of heads is not in any file.
    decoder_depth: PositiveInt = 8
    decoder_embed_dim: PositiveInt = 512  # its width
    decoder_num_heads: PositiveInt = 16  # its attention heads
    # Input of a classifier, where the objective taps its logits: the mean of the patch tokens, or CLS.
    pool: Literal["mean", "cls"] = "mean"
    # Standardisation of its features before they are compared; zscore and phi_s need `dmae-ds teacher stats`
    # once.
    standardize: Literal["none", "layer_norm", "zscore", "phi_s"] = "none"
    stats: str | None = None  # the file that `dmae-ds teacher stats` wrote; null: the one next to the weights
    # Licence of the weights, for the cards of exports, where neither timm nor a card next to the weights has
    # it: cc-by-nc-4.0.
    license: str | None = None

    _section: str = PrivateAttr("teacher")

    @property
    def section(self) -> str:
        """Name of its section in the recipe: `teacher`, or `teachers.dino` of one of several."""
        return self._section

    def key(self, name: str) -> str:
        """Full name of one of its keys for messages: `teacher.weights`, `teachers.dino.weights`."""
        return f"{self.section}.{name}"

    @model_validator(mode="after")
    def _keys_go_together(self):
        self.check_keys()
        return self

    def check_keys(self) -> None:
        """Raise ValueError for keys that do not go together."""
        key = self.key
        is_stored = self.placement == "cache"
        if is_stored != (self.cache is not None):
            raise ValueError(
                f"{key('placement')} {self.placement} does not go with {key('cache')} {self.cache}; "
                "placement=cache requires what dmae-ds teacher cache wrote, other placements have no cache"
            )
        has_none = not self.pretrained and self.weights is None
        if self.pretrained == (self.weights is not None) and not (is_stored and has_none):
            raise ValueError(
                f"give either {key('weights')}, or {key('pretrained')}=true with a tagged name such as "
                "vit_large_patch16_224.mae"
            )
        if self.pretrained and ("." not in self.name or self.format != "timm"):
            raise ValueError(
                f"{key('pretrained')} requires a name with timm's tag, such as vit_large_patch16_224.mae, "
                f"and format timm; found {self.name}, {self.format}"
            )
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"give both {key('mean')} and {key('std')}, or neither")
        if self.mean is not None and not len(self.mean) == len(self.std) == (self.in_chans or 3):
            raise ValueError(
                f"{key('mean')} has {len(self.mean)} and {key('std')} {len(self.std)} numbers, and the "
                f"teacher {self.in_chans or 3} channels ({key('in_chans')}); give one number a channel"
            )
        if (self.placement == "pipeline") != (self.stages is not None):
            raise ValueError(
                f"{key('placement')} {self.placement} does not go with {key('stages')} {self.stages}; "
                "placement=pipeline requires a number of stages, other placements have none"
            )
        if (self.sees == "superset") != (self.mask_ratio is not None):
            raise ValueError(
                f"{key('sees')} {self.sees} does not go with {key('mask_ratio')} {self.mask_ratio}; "
                "sees=superset requires a mask ratio, the others have none"
            )
        if self.dtype == "fp8" and self.placement not in ("replicated", "cache"):
            raise ValueError(
                f"{key('dtype')} fp8 requires {key('placement')}=replicated, found {self.placement}; "
                f"set that, or {key('dtype')}=bf16"
            )
        if self.stats is not None and self.standardize not in ("zscore", "phi_s"):
            raise ValueError(
                f"{key('stats')} requires {key('standardize')}=zscore or phi_s, found {self.standardize}; "
                f"set one of them, or remove {key('stats')}"
            )

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, value: str) -> str:
        return known_format(value)

    def whole_image_family(self) -> str | None:
        """Name of its family, by name, format or file, where its training never dropped tokens; else None."""
        names = (self.name, self.format, PurePath(self.weights or "").name)
        found = re.search(r"dino|siglip|(?<![a-z])clip(?![a-z])", " ".join(names).lower())
        return found and {"dino": "DINO", "siglip": "SigLIP", "clip": "CLIP"}[found[0]]

    @property
    def dtype_is_auto(self) -> bool:
        """Whether `dtype` follows something else: nobody set it, or to auto."""
        return "dtype" not in self.model_fields_set or self.dtype == "auto"

    def following(self, dtype: str) -> TeacherConfig:
        """The same section with a dtype that it follows."""
        copy = self.model_copy(update={"dtype": dtype})
        copy.model_fields_set.discard("dtype")
        return copy


class NamedTeacherConfig(TeacherConfig):
    """One of several teachers, by its name: the keys of `teacher`, and its weight."""

    weight: NonNegativeFloat = 1.0  # factor of all its terms in the loss, besides each term's own weight

    @model_validator(mode="after")
    def _keys_go_together(self):
        return self  # checked by `called`, whose messages have the name

    def called(self, name: str) -> NamedTeacherConfig:
        """The same section, which knows its name. Raises ValueError for keys that do not go together."""
        self._section = f"teachers.{name}"
        self.check_keys()
        return self
