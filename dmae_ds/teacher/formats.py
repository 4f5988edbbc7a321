"""Checkpoint formats: named key maps, chosen in the recipe (`teacher.format`), never guessed.

A map takes a key of the file to timm's name for it. Containers (.safetensors, .pth) are opened lazily, so that a
tensor's bytes are read when, and only if, it is asked for. Pickles load with weights_only=True: no code runs.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Callable, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmae_ds.errors import UserError


def _same(key: str) -> str:
    return key


# format -> (key of the file -> timm's key, the entry of a .pth that holds the tensors or None)
FORMATS: dict[str, tuple[Callable[[str], str], str | None]] = {
    "timm": (_same, None),
    "mae": (_same, "model"),  # the published MAE files name the encoder as timm does, with decoder_* beside it
}


class LazyTensors(Mapping):
    """A weights file as a mapping of timm's keys to tensors, each read when it is asked for."""

    def __init__(self, path: Path, keys: dict[str, str], shapes: Callable[[str], tuple[int, ...]], read: Callable[[str], Tensor]):
        self.path, self._keys, self._shapes, self._read = path, keys, shapes, read

    def __getitem__(self, key: str) -> Tensor:
        return self._read(self._keys[key])

    def __iter__(self):
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._shapes(self._keys[key])


def open_weights(path: str | Path, format: str) -> LazyTensors:
    """Open a weights file in a named format.

    Raises UserError where the file is missing, damaged, or not of this container.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"teacher.weights '{path}' is not a file; give the path of a .safetensors or .pth file")
    to_timm, entry = FORMATS[format]
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"teacher.weights '{path}' is not a whole safetensors file ({error}); copy it again") from None
        keys = {to_timm(key): key for key in file.keys()}
        return LazyTensors(path, keys, lambda key: tuple(file.get_slice(key).get_shape()), file.get_tensor)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"teacher.weights '{path}' can't be read as tensors only ({str(error).splitlines()[0]}); save its state dict as .safetensors") from None
    if entry is not None:
        if not isinstance(content, dict) or entry not in content:
            raise UserError(f"teacher.weights '{path}' has no entry '{entry}', which format {format} needs; is teacher.format right?")
        content = content[entry]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"teacher.weights '{path}' is not a plain dict of tensors, which format {format} needs; is teacher.format right?")
    keys = {to_timm(key): key for key in content}
    return LazyTensors(path, keys, lambda key: tuple(content[key].shape), content.__getitem__)
