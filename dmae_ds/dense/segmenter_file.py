"""Files of segmenters: best.safetensors and last.safetensors, complete with what builds them again.

Metadata: `timm_name` and `timm_overrides` of the ViT, and `segmenter`, JSON with the head's section of the
recipe, the classes, the pixel statistics and the value of no class. Tensors: `backbone.` with timm's names,
`decoder.`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from dmae_ds.config.networks import ModelConfig
from dmae_ds.config.segmentation import HeadSection
from dmae_ds.dense.backbone import build_backbone
from dmae_ds.dense.network_file import described_network, fill_network, save_network
from dmae_ds.dense.segmenter import Segmenter


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
    save_network(path, segmenter, facts.network, described, kind="segmenter", extra=extra)


def read_facts(path: Path, *, label: str) -> SegmenterFacts:
    """What the metadata of a segmenter's file say, without torch's tensors.

    label: the user's name for the file. Raises UserError for another kind of file.
    """
    kind = {"kind": "segmenter", "command": "dmae-ds eval segment"}
    with described_network(path, label=label, **kind) as (network, described):
        head = TypeAdapter(HeadSection).validate_python(described.pop("head"))
        return SegmenterFacts(network=network, head=head, **described)


def load_segmenter(path: Path, *, label: str) -> tuple[Segmenter, SegmenterFacts]:
    """Build a segmenter from its file, on the CPU in eval mode. Raises UserError for another kind of file."""
    facts = read_facts(path, label=label)
    vit = build_backbone(facts.network, seed=0, where=label)
    segmenter = Segmenter(vit, facts.head, num_classes=len(facts.classes), seed=0)
    fill_network(segmenter, path, label=label)
    return segmenter.eval(), facts
