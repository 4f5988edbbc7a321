"""Initial weights of a student: those of an earlier run or of any weights file (G2SD: the specific stage)."""

from __future__ import annotations

from pathlib import Path

from dmae_ds.config.networks import ModelConfig, looks_like_hub_id
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.weights.hub import locate
from dmae_ds.weights.label import STUDENT, Label
from dmae_ds.weights.load import load_network


def fill_student(student: MaskedViT, weights: str, network: ModelConfig, *, label: Label = STUDENT) -> str:
    """Read every tensor of a student on the CPU; heads and decoders stay in the file.

    weights: a run folder, a file of any known format, or a hub id; label: its keys, for messages
    Positional embeddings of another grid are fitted. Returns what was changed or not read of the file, in one
    line; empty where nothing was. Raises UserError where the file is missing or doesn't
    fit.
    """
    if not Path(weights).expanduser().exists() and not looks_like_hub_id(weights):
        raise UserError(
            f"{label.weights} '{weights}' is neither a run folder nor a weights file; give one that "
            "`dmae-ds train` wrote, a .safetensors or .pth file, or a hub id"
        )
    loaded = load_network(
        locate(weights, label=label),
        student.state_dict(),
        network=(network.name, network.overrides()),
        depth=student.depth,
        grid=student.grid,
        num_prefix=student.num_prefix_positions,
        label=label,
    )
    student.load_state_dict(loaded.tensors)
    return "; ".join(loaded.notes)
