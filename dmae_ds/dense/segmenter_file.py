"""Files of segmenters: best.safetensors and last.safetensors, complete with what builds them again.

Metadata: `timm_name` and `timm_overrides` of the ViT, and `segmenter`, JSON with the head's section of the
recipe, the classes, the pixel statistics and the value of no class. Tensors: `backbone.` with timm's names,
`decoder.`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file

from dmae_ds.config.networks import ModelConfig
from dmae_ds.config.segmentation import HeadSection
from dmae_ds.dense.backbone import build_backbone
from dmae_ds.dense.segmenter import Segmenter
from dmae_ds.errors import UserError
from dmae_ds.output.durable import replace_tensors
from dmae_ds.output.safetensors_header import read_header


@dataclass(frozen=True)
class SegmenterFacts:
    """What builds a segmenter again, and how its images are prepared.

    short_side, window, stride: of its evaluation, in px
    """

    network: ModelConfig
    head: HeadSection
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_side: int
    window: int
    stride: int


def save_segmenter(path: Path, segmenter: Segmenter, facts: SegmenterFacts, **extra: object) -> None:
    """Write a segmenter, complete or not at all; `extra` goes into the metadata as text."""
    described = {
        "head": facts.head.model_dump(),
        "classes": facts.classes,
        "mean": list(facts.mean),
        "std": list(facts.std),
        "short_side": facts.short_side,
        "window": facts.window,
        "stride": facts.stride,
    }
    metadata = {
        "format": "pt",
        "timm_name": facts.network.name,
        "timm_overrides": json.dumps(facts.network.overrides()),
        "segmenter": json.dumps(described),
        **{name: str(value) for name, value in extra.items()},
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in segmenter.state_dict().items()}
    replace_tensors(path, tensors, metadata)


def read_facts(path: Path, *, label: str) -> SegmenterFacts:
    """What the metadata of a segmenter's file say, without torch's tensors.

    label: the user's name for the file. Raises UserError for another kind of file.
    """
    if not path.is_file():
        raise UserError(f"{label} '{path}' not found; give best.safetensors of `dmae-ds eval segment`")
    header = read_header(path)
    try:
        metadata = header.metadata
        described = json.loads(metadata["segmenter"])
        overrides = json.loads(metadata["timm_overrides"])
        return SegmenterFacts(
            network=ModelConfig(name=metadata["timm_name"], **overrides),
            head=TypeAdapter(HeadSection).validate_python(described.pop("head")),
            **described,
        )
    except (AttributeError, KeyError, TypeError, ValueError, ValidationError):
        raise UserError(
            f"{label} '{path}' is not a segmenter's file; give best.safetensors of `dmae-ds eval segment`"
        ) from None


def load_segmenter(path: Path, *, label: str) -> tuple[Segmenter, SegmenterFacts]:
    """Build a segmenter from its file, on the CPU in eval mode. Raises UserError for another kind of file."""
    facts = read_facts(path, label=label)
    vit = build_backbone(facts.network, seed=0, where=label)
    segmenter = Segmenter(vit, facts.head, num_classes=len(facts.classes), seed=0)
    try:
        segmenter.load_state_dict(load_file(path), strict=True)
    except Exception as error:  # safetensors and torch raise their own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{label} '{path}' does not fit its own description ({reason}); copy it again"
        ) from None
    return segmenter.eval(), facts
