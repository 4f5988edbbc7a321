"""`dmae-ds export --to original`: the student under the names of the file that it began from.

A student that continues a released backbone (`student.weights`) goes back to that project's own code. Tensors
that the training does not have, such as DINOv3's mask token, are those of that file.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.export.source import Inputs, Source
from dmae_ds.output.durable import write_tensors
from dmae_ds.weights.hub import locate
from dmae_ds.weights.label import STUDENT
from dmae_ds.weights.load import load_network, open_format
from dmae_ds.weights.named import Weights, open_weights

BETTER = {"hf": "hf", "timm": "safetensors", "mae": "safetensors", "dmae_ds": "safetensors"}


def write_original(source: Source, folder: Path) -> None:
    """Write one file, of the kind (.pth or .safetensors) of the one in `student.weights`, in float32.

    Raises UserError where the student began from no such file, or another layout holds it as well.
    """
    weights = _first_weights(source)
    tensors = {key: weights.container[key] for key in weights.container}
    for name, tensor in source.tensors.items():
        place = weights.sources[name]
        old = [tensors[key].float() for key in place.names]
        new = place.undo(tensor, *old)
        if any(one.shape != other.shape for one, other in zip(old, new, strict=True)):
            raise UserError(
                f"'{name}' has {list(tensor.shape)} in the student and was made of "
                f"{[list(piece.shape) for piece in old]} in '{weights.path}'; export --to safetensors"
            )
        tensors |= dict(zip(place.names, new, strict=True))
    tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    file = folder / _file_name(weights.path)
    if file.suffix == ".safetensors":
        write_tensors(file, tensors, {"format": "pt"})
    else:
        torch.save(tensors, file)


def run_original(source: Source, folder: Path, inputs: Inputs) -> dict[str, Tensor]:
    """Return what timm's network computes with the written file, read as any other of its format."""
    weights = _first_weights(source)
    model = timm.create_model(source.name, **source.overrides, **source.keys)
    loaded = load_network(
        folder / _file_name(weights.path),
        model.state_dict(),
        network=(source.name, source.overrides),
        depth=len(model.blocks),
        grid=source.grid,
        num_prefix=0,
        label=STUDENT,
        format=weights.format,
    )
    model.load_state_dict(loaded.tensors)
    return {"tokens": model.eval().forward_features(inputs.pixels)}


def explain_original(source: Source, name: str) -> str:
    """Return Python that loads it."""
    weights = _first_weights(source)
    path = f"{name}/{_file_name(weights.path)}"
    if path.endswith(".safetensors"):
        return f'import safetensors.torch\ntensors = safetensors.torch.load_file("{path}")'
    return f'import torch\ntensors = torch.load("{path}", map_location="cpu", weights_only=True)'


def _first_weights(source: Source) -> Weights:
    """The file of `student.weights`, under timm's names. Raises UserError."""
    word = source.config.student.weights
    if word is None:
        raise UserError(
            "--to original writes the names of the file in student.weights, and this student began with "
            "random weights; export --to safetensors, timm or hf"
        )
    path, depth = locate(word, label=STUDENT), len(source.vit.blocks)
    needed = source.tensors
    weights = open_format(path, needed, format="auto", depth=depth, may_resize=True, label=STUDENT)
    if weights.format in BETTER:
        raise UserError(
            f"student.weights '{path}' has the names of format {weights.format}; export --to "
            f"{BETTER[weights.format]} writes them"
        )
    return open_weights(path, weights.format, label=STUDENT)


def _file_name(path: Path) -> str:
    return "model.safetensors" if path.suffix == ".safetensors" else "model.pth"
