"""Read a network's tensors from a weights file: open it, check that it fits, fit its positional embeddings.

Teachers, students that begin with an earlier run's weights, classifiers that are fine-tuned and their
teachers are all read here. A `label` says which keys of the recipe the messages name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.weights.choose import choose_format
from dmae_ds.weights.fit import Dropped, check_fit
from dmae_ds.weights.label import Label
from dmae_ds.weights.metadata import check_same_network, own_network_if_readable
from dmae_ds.weights.named import Weights, open_weights
from dmae_ds.weights.positions import fit_positions

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LoadedNetwork:
    """A whole network's tensors in fp32, their file, what was left in it, and notes on what was changed."""

    tensors: dict[str, Tensor]
    weights: Weights
    dropped: Dropped
    notes: list[str]


def load_network(
    path: Path,
    needed: dict[str, Tensor],
    *,
    network: tuple[str, dict],
    depth: int,
    grid: tuple[int, int],
    num_prefix: int,
    label: Label,
    format: str = "auto",
) -> LoadedNetwork:
    """Read a whole network on the CPU, in fp32; heads and decoders that are not needed stay in the file.

    needed: {name: tensor of the right shape}; num_prefix: rows of pos_embed in front of the patches
    network, depth: (timm's name, overrides) and number of blocks, with which the file must agree
    Raises UserError where the file is missing, damaged, or doesn't fit.
    """
    weights = open_format(path, needed, format=format, depth=depth, may_resize=True, label=label)
    dropped = check_fit(needed, weights, depth=depth, may_resize=True)
    if dropped.blocks:
        raise UserError(
            f"{label.weights} '{path}' has more blocks than the {depth} of {network[0]}; make {label.name} "
            "and its numbers agree with the file"
        )
    named = own_network_if_readable(weights.container)
    if named is not None:
        check_same_network(path, named, network, label=label)
    tensors, notes = read_tensors(
        weights,
        needed,
        num_prefix={"pos_embed": num_prefix},
        grid=grid,
        dtype=torch.float32,
        fit_dtype=torch.float32,
    )
    notes += [weights.container.note] if weights.container.note else []
    return LoadedNetwork(tensors, weights, dropped, notes)


def open_format(
    path: Path, needed: dict[str, Tensor], *, format: str, depth: int, may_resize: bool, label: Label
) -> Weights:
    """Open a file in its format; `auto` takes the one format under which it fits. Raises UserError."""
    if format == "auto":
        return choose_format(path, needed, depth=depth, may_resize=may_resize, label=label)
    return open_weights(path, format, label=label)


def read_tensors(
    weights: Weights,
    needed: dict[str, Tensor],
    *,
    num_prefix: dict[str, int],
    grid: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device = CPU,
    fit_dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """Read exactly the needed tensors, positional embeddings fitted to a grid.

    One tensor is read at a time: the peak is what is kept and one tensor of the file.
    num_prefix: {name of a positional embedding: its rows in front of the patches}
    fit_dtype: the dtype that positional embeddings are rounded to when they are fitted; None: the file's
    Returns the tensors, and a line for each way in which positions were fitted.
    """
    notes: list[str] = []

    def read(name: str) -> Tensor:
        tensor = weights[name]
        if name in num_prefix and tensor.shape != needed[name].shape:
            positions = tensor.to(fit_dtype or tensor.dtype)
            tensor, note = fit_positions(
                positions, num_prefix=num_prefix[name], grid=grid, label=weights.label
            )
            notes.extend([] if note in notes else [note])
        return tensor.to(device=device, dtype=dtype)

    return {name: read(name) for name in needed}, notes
