"""`format: auto`: find the one format under which a weights file fits a network."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.weights.fit import fits
from dmae_ds.weights.formats import FORMATS
from dmae_ds.weights.label import WEIGHTS, Label
from dmae_ds.weights.named import Weights, open_weights
from dmae_ds.weights.roots import SeveralNetworks


def choose_format(
    path: Path, needed: dict[str, Tensor], *, depth: int, may_resize: bool, label: Label = WEIGHTS
) -> Weights:
    """Open the file in the one format under which it fits; formats that name the same tensors count as one.

    needed, depth, may_resize: the network, as for `check_fit`
    Raises UserError where no format fits, or more than one does.
    """
    fitting: list[Weights] = []
    opened: list[Weights] = []
    errors: list[UserError] = []
    for format in FORMATS:
        try:
            weights = open_weights(path, format, label=label)
        except UserError as error:
            errors.append(error)
            continue
        opened.append(weights)
        same = next((number for number, other in enumerate(fitting) if _same_names(weights, other)), None)
        if same is not None:
            # Of formats with the same names, the one that keeps them in this entry.
            fitting[same] = max(fitting[same], weights, key=lambda one: one.in_own_entry)
        elif fits(needed, weights, depth=depth, may_resize=may_resize):
            fitting.append(weights)
    if len(fitting) == 1:
        return fitting[0]
    several = next((error for error in errors if isinstance(error, SeveralNetworks)), None)
    if several is not None and not fitting:
        raise several
    if not opened:
        raise errors[0]
    if fitting:
        formats = ", ".join(weights.format for weights in fitting)
        advice = f"set {label.format} to the right one" if label.format else "save it under timm's names"
        raise UserError(
            f"{label.weights} '{path}' fits the formats {formats}, with different tensors; {advice}"
        )
    raise UserError(_explain_nearest(path, needed, opened, label))


def _same_names(one: Weights, other: Weights) -> bool:
    return _names(one) == _names(other)


def _names(weights: Weights) -> dict[str, tuple[str, ...]]:
    return {name: source.names for name, source in weights.sources.items()}


def _explain_nearest(path: Path, needed: dict[str, Tensor], opened: list[Weights], label: Label) -> str:
    nearest = min(opened, key=lambda weights: len(needed.keys() - weights.keys()))
    missing = [name for name in needed if name not in nearest]
    problem = "with other shapes, or names left over"
    if missing:
        problem = f"missing {len(missing)}: {', '.join(missing[:3])}"
    advice = f"make {label.name} and its numbers agree with the file"
    if label.format:
        advice += f", or set {label.format}"
    return (
        f"{label.weights} '{path}' fits the {label.network} under no known format; nearest is "
        f"{nearest.format}, {problem}; {advice}"
    )
