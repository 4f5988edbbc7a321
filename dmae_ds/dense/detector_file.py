"""Files of detectors: best.safetensors and last.safetensors, complete with what builds them again.

Metadata: `timm_name` and `timm_overrides` of the ViT, and `detector`, JSON with the recipe's section, the
classes, the pixel statistics and the sizes. Tensors: `backbone.trunk.vit.` with timm's names, then
torchvision's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from dmae_ds.config.detection import DetectConfig, DetectorConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.dense.backbone import build_backbone
from dmae_ds.dense.detector import Detector, build_detector, build_trunk
from dmae_ds.errors import UserError
from dmae_ds.output.durable import replace_tensors
from dmae_ds.output.safetensors_header import read_header

_WANTED = "give best.safetensors or last.safetensors of `dmae-ds eval detect`"


@dataclass(frozen=True)
class DetectorFacts:
    """What builds a detector again, and how its images are prepared.

    sizes: shorter edge of images and the limit of the longer one, in pixels
    """

    network: ModelConfig
    detector: DetectorConfig
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: tuple[int, int]

    @classmethod
    def of(cls, config: DetectConfig, *, img_size: int, classes: list[str]) -> DetectorFacts:
        """A recipe's, for a network of img_size px."""
        return cls(
            network=config.network.model_copy(update={"img_size": img_size}),
            detector=config.detector,
            classes=classes,
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            sizes=config.resize or (img_size, img_size),
        )


def put_together(vit: torch.nn.Module, facts: DetectorFacts, *, seed: int) -> Detector:
    """A detector on a timm ViT; weights of pyramid and heads are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_detector(
            build_trunk(vit, facts.detector),
            facts.detector,
            num_classes=len(facts.classes),
            sizes=facts.sizes,
            pixels=(facts.mean, facts.std),
        )


def save_detector(path: Path, detector: Detector, facts: DetectorFacts, **extra: object) -> None:
    """Write a detector, complete or not at all; `extra` goes into the metadata as text."""
    described = {
        "detector": facts.detector.model_dump(mode="json"),
        "classes": facts.classes,
        "mean": facts.mean,
        "std": facts.std,
        "sizes": facts.sizes,
    }
    metadata = {
        "format": "pt",
        "timm_name": facts.network.name,
        "timm_overrides": json.dumps(facts.network.overrides()),
        "detector": json.dumps(described),
        **{name: str(value) for name, value in extra.items()},
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in detector.state_dict().items()}
    replace_tensors(path, tensors, metadata)


def read_facts(path: Path, *, label: str) -> DetectorFacts:
    """What the metadata of a detector's file say, without its tensors.

    label: the user's name for the file. Raises UserError for another kind of file.
    """
    if not path.is_file():
        raise UserError(f"{label} '{path}' not found; {_WANTED}")
    header = read_header(path)
    metadata = {} if header is None else header.metadata
    try:
        described = json.loads(metadata["detector"])
        overrides = json.loads(metadata["timm_overrides"])
        return DetectorFacts(
            network=ModelConfig(name=metadata["timm_name"], **overrides),
            detector=DetectorConfig(**described["detector"]),
            classes=list(described["classes"]),
            mean=tuple(described["mean"]),
            std=tuple(described["std"]),
            sizes=tuple(described["sizes"]),
        )
    except (KeyError, TypeError, ValueError, ValidationError):
        raise UserError(f"{label} '{path}' is not a detector's file; {_WANTED}") from None


def load_detector(path: Path, *, label: str) -> tuple[Detector, DetectorFacts]:
    """Build a detector from its file, on the CPU in eval mode. Raises UserError for another kind of file."""
    facts = read_facts(path, label=label)
    vit = build_backbone(facts.network, seed=0, where=label)
    detector = put_together(vit, facts, seed=0)
    try:
        detector.load_state_dict(load_file(path), strict=True)
    except Exception as error:  # safetensors and torch raise their own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{label} '{path}' does not fit its own description ({reason}); copy it again"
        ) from None
    return detector.eval(), facts
