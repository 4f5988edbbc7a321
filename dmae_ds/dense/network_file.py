"""Files of networks for dense tasks: tensors, and metadata from which the network is built again.

Metadata: `timm_name` and `timm_overrides` of the ViT, and one entry of the kind's own, JSON.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from dmae_ds.config.networks import ModelConfig
from dmae_ds.errors import UserError
from dmae_ds.output.durable import replace_tensors
from dmae_ds.output.safetensors_header import read_header


def save_network(
    path: Path, network: nn.Module, vit: ModelConfig, described: dict, *, kind: str, extra: dict[str, object]
) -> None:
    """Write a network, complete or not at all.

    vit: of the ViT inside; described: what else builds it again, under the entry `kind`
    extra: further metadata, as text
    """
    metadata = {
        "format": "pt",
        "timm_name": vit.name,
        "timm_overrides": json.dumps(vit.overrides()),
        kind: json.dumps(described),
        **{name: str(value) for name, value in extra.items()},
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    replace_tensors(path, tensors, metadata)


@contextmanager
def described_network(
    path: Path, *, kind: str, label: str, command: str
) -> Iterator[tuple[ModelConfig, dict]]:
    """Give the ViT and the description that `save_network` wrote, without reading a tensor.

    label: the user's name for the file; command: that writes such files
    Raises UserError for another kind of file, also where the body of the context does not understand it.
    """
    wanted = f"give best.safetensors or last.safetensors of `{command}`"
    if not path.is_file():
        raise UserError(f"{label} '{path}' not found; {wanted}")
    header = read_header(path)
    metadata = {} if header is None else header.metadata
    try:
        vit = ModelConfig(name=metadata["timm_name"], **json.loads(metadata["timm_overrides"]))
        yield vit, json.loads(metadata[kind])
    except (KeyError, TypeError, ValueError, ValidationError):
        raise UserError(f"{label} '{path}' is not a {kind}'s file; {wanted}") from None


def fill_network(network: nn.Module, path: Path, *, label: str) -> None:
    """Read every tensor of a network that was built from the same file, and no other. Raises UserError."""
    try:
        network.load_state_dict(load_file(path), strict=True)
    except Exception as error:  # safetensors and torch raise their own kinds
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{label} '{path}' does not fit its own description ({reason}); copy it again"
        ) from None
