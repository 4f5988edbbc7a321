"""Open a weights file of any known kind as a table of tensors; no code in it is ever run.

safetensors                a JSON header with every tensor's place (safetensors_file.py)
torch.save's zip files     opened with weights_only=True (torch_file.py)
*.index.json, or a folder  several files of either kind, joined

A file is known by its first bytes, whatever its name: .pth, .pth.tar, .ckpt, .bin, .pt, or none. What other
files are and what to do with them is in unreadable.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dmae_ds.errors import UserError
from dmae_ds.output.safetensors_header import is_safetensors
from dmae_ds.weights.content import IN_A_FOLDER
from dmae_ds.weights.label import WEIGHTS, Label
from dmae_ds.weights.places import Container
from dmae_ds.weights.roots import narrow
from dmae_ds.weights.safetensors_file import open_safetensors
from dmae_ds.weights.torch_file import is_zip, open_torch
from dmae_ds.weights.unreadable import describe_folder, describe_unreadable

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def open_container(
    path: Path,
    entries: tuple[str, ...] = (),
    formats: dict[str, list[str]] | None = None,
    *,
    anchor: re.Pattern | None = None,
    label: Label = WEIGHTS,
) -> Container:
    """Open a weights file, an index of several files, or a folder that holds one of IN_A_FOLDER.

    anchor: finds the network in the file by its patch projection, see roots.py; None: names are left as they
    are
    entries: where no anchor is found, names under which a .pth may hold its weights; the first that is there
    wins, else the top level
    formats: {entry: the formats that read it}, to suggest one where another entry is found
    label: the keys that messages name
    Raises UserError where the file is missing, damaged, of an unknown kind, or would run code.
    """
    if path.is_dir():
        inside = next((path / name for name in IN_A_FOLDER if (path / name).is_file()), None)
        if inside is None:
            raise UserError(f"{label.weights} '{path}' {describe_folder(path, IN_A_FOLDER)}")
        path = inside
    if not path.is_file():
        raise UserError(
            f"{label.weights} '{path}' is not a file; give the path of a {', '.join(SUFFIXES)} file, an "
            "index, or a folder"
        )
    if path.name.endswith(".index.json"):
        container = _open_index(path, entries, formats, label)
    elif path.suffix == ".safetensors" and is_zip(path):  # torch.load would go by the name
        raise UserError(
            f"{label.weights} '{path}' is a file of torch.save, whatever its name; rename it: "
            f"mv {path.name} {path.stem}.pth"
        )
    elif is_safetensors(path) or path.suffix == ".safetensors":
        container = open_safetensors(path, label)
    else:
        reason = describe_unreadable(path)
        if reason:
            raise UserError(f"{label.weights} '{path}' {reason}")
        container = open_torch(path, entries, formats or {}, label, anchor)
    return container if anchor is None else narrow(container, anchor)


def _open_index(
    path: Path, entries: tuple[str, ...], formats: dict[str, list[str]] | None, label: Label
) -> Container:
    names = read_index(path, label=label)
    here = [name for name in names if (path.parent / name).is_file()]
    opened = [open_container(path.parent / name, entries, formats, label=label) for name in here]
    joined = join_containers(path, opened, label=label)
    joined.absent = [name for name in names if name not in here]
    return joined


def join_containers(path: Path, containers: list[Container], *, label: Label = WEIGHTS) -> Container:
    """Join several containers into one; a name that two of them hold is read from the first."""
    joined = Container(path, {}, label=label)
    for container in reversed(containers):
        joined.places |= container.places
        joined.metadata |= container.metadata
    return joined


def read_index(path: Path, *, label: Label = WEIGHTS) -> list[str]:
    """Names of the files that an index joins, all in its folder. Raises UserError."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{label.weights} '{path}' is not an index of weights files ({type(error).__name__}: {error}); "
            "copy it again"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in SUFFIXES:
            raise UserError(
                f"{label.weights} '{path}' names the file {name!r}, which is not the plain name of a "
                "weights file; the index can't be trusted"
            )
    return names
