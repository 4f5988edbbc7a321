"""The network that a file written by this project names in its metadata, compared with the recipe's.

Shapes alone can't tell two networks apart that differ in the number of heads.
"""

from __future__ import annotations

import json
from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.weights.label import Label
from dmae_ds.weights.named import Weights
from dmae_ds.weights.places import Container


def own_network(container: Container) -> tuple[str, dict] | None:
    """Return (timm name, overrides) from the metadata of a file of ours; None for other files.

    Raises UserError where a file of an early version has no readable overrides.
    """
    if "timm_name" not in container.metadata:
        return None
    label = container.label
    try:
        return container.metadata["timm_name"], dict(json.loads(container.metadata["timm_overrides"]))
    except (KeyError, ValueError, TypeError):
        advice = f"set {label.format} to timm" if label.format else "give a file of a later version"
        raise UserError(
            f"{label.weights} '{container.path}' was written by an early version of this project; {advice}"
        ) from None


def own_network_if_readable(container: Container) -> tuple[str, dict] | None:
    """Like `own_network`, but None for a file of an early version too."""
    try:
        return own_network(container)
    except UserError:
        return None


def check_own_metadata(weights: Weights, network: tuple[str, dict] | None) -> None:
    """Check a file that was opened as one of ours (format dmae_ds): it names a network, and it is this one.

    network: (name, overrides) of the recipe; None: any
    Raises UserError.
    """
    if weights.format != "dmae_ds":
        return
    named = own_network(weights.container)
    if named is None:
        label = weights.label
        advice = f"set {label.format} to timm or to what it is" if label.format else "give a file that does"
        raise UserError(
            f"{label.weights} '{weights.path}' was not written by this project (it names no network); "
            f"{advice}"
        )
    if network is not None:
        check_same_network(weights.path, named, network, label=weights.label)


def check_same_network(
    path: Path, named: tuple[str, dict], network: tuple[str, dict], *, label: Label
) -> None:
    """Raise UserError unless (name, overrides) of a file are those of the recipe.

    The image size may differ: the positional embedding follows the recipe's. A tag after a name's dot names
    weights, not another network.
    """
    file_name, file_numbers = _without_size(*named)
    name, numbers = _without_size(*network)
    if (file_name, file_numbers) != (name, numbers):
        raise UserError(
            f"{label.weights} '{path}' holds {file_name} {file_numbers or ''}, the recipe's {label.network} "
            f"is {name} {numbers or ''}; make {label.name} and its numbers agree with the file"
        )


def _without_size(name: str, overrides: dict) -> tuple[str, dict]:
    return name.split(".")[0], {key: value for key, value in overrides.items() if key != "img_size"}
