"""Files of detectors: best.safetensors and last.safetensors, complete with what builds them again.

Metadata: `timm_name` and `timm_overrides` of the ViT, and `detector`, JSON with the recipe's section, the
classes, the pixel statistics and the sizes. Tensors: `backbone.trunk.vit.` with timm's names, then
torchvision's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dmae_ds.config.detection import DetectConfig, DetectorConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.dense.backbone import build_backbone
from dmae_ds.dense.detector import Detector, build_detector, build_trunk
from dmae_ds.dense.network_file import described_network, fill_network, save_network


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
    save_network(path, detector, facts.network, described, kind="detector", extra=extra)


def read_facts(path: Path, *, label: str) -> DetectorFacts:
    """What the metadata of a detector's file say, without its tensors.

    label: the user's name for the file. Raises UserError for another kind of file.
    """
    kind = {"kind": "detector", "command": "dmae-ds eval detect"}
    with described_network(path, label=label, **kind) as (network, described):
        return DetectorFacts(
            network=network,
            detector=DetectorConfig(**described["detector"]),
            classes=list(described["classes"]),
            mean=tuple(described["mean"]),
            std=tuple(described["std"]),
            sizes=tuple(described["sizes"]),
        )


def load_detector(path: Path, *, label: str) -> tuple[Detector, DetectorFacts]:
    """Build a detector from its file, on the CPU in eval mode. Raises UserError for another kind of file."""
    facts = read_facts(path, label=label)
    detector = put_together(build_backbone(facts.network, seed=0, where=label), facts, seed=0)
    fill_network(detector, path, label=label)
    return detector.eval(), facts
