"""What the first bytes of a weights file show before torch is imported, in a fraction of a second."""

from __future__ import annotations

import re
from pathlib import Path

from dmae_ds.config.networks import ModelConfig
from dmae_ds.errors import UserError
from dmae_ds.output.safetensors_header import read_header
from dmae_ds.weights.label import Label
from dmae_ds.weights.unreadable import describe_unreadable

# Widths of timm's plain ViTs by the size in their names.
WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}


def check_file(path: Path, network: ModelConfig | None, label: Label) -> None:
    """Raise UserError where a file holds no weights, or those of another width than the network's.

    network: None where the file decides. Whatever needs torch to be known is checked when the network is
    built.
    """
    if not path.is_file() or path.name.endswith(".index.json"):
        return
    header = read_header(path)
    if header is None:
        reason = "" if path.suffix == ".safetensors" else describe_unreadable(path)
        if reason:
            raise UserError(f"{label.weights} '{path}' {reason}")
        return
    width = None if network is None else width_of(network)
    tokens = {name: shape for name, shape in header.shapes.items() if name.endswith("cls_token")}
    if width is None or len(tokens) != 1:
        return
    ((name, shape),) = tokens.items()
    if shape[-1:] != [width]:
        embed_dim = label.name.removesuffix("name") + "embed_dim"
        raise UserError(
            f"{label.weights} '{path}' has {name} {shape}, expected {[*shape[:-1], width]} by "
            f"{label.name} {network.name} and {embed_dim} {network.embed_dim}; make them fit"
        )


def width_of(network: ModelConfig) -> int | None:
    """Width of a network by its recipe, or by the size in the name of one of timm's plain ViTs; else None."""
    match = re.match(r"vit_([a-z]+)_patch\d+_(?!plus)", network.name)
    return network.embed_dim or (WIDTHS.get(match[1]) if match else None)
