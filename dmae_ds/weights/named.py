"""Open a weights file under timm's names, in a named format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator, Mapping

from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.weights.containers import join_containers, open_container
from dmae_ds.weights.formats import FORMATS, Source, Sources, find_format, join_pieces, keep
from dmae_ds.weights.label import WEIGHTS, Label
from dmae_ds.weights.places import Container


class Weights(Mapping):
    """A weights file under timm's names: {name: tensor}, each read when it is asked for.

    ignored: names of the file that the format knows and doesn't need
    """

    def __init__(self, container: Container, format: str, sources: Sources, ignored: list[str]):
        self.container = container
        self.format = format
        self.sources = sources
        self.ignored = ignored

    @property
    def path(self) -> Path:
        return self.container.path

    @property
    def in_own_entry(self) -> bool:
        """Whether the file keeps them in an entry that tells this format from others with the same names."""
        known = FORMATS.get(self.format)
        return known is not None and self.container.root.split(".")[0] in known.entries

    @property
    def label(self) -> Label:
        return self.container.label

    def __getitem__(self, name: str) -> Tensor:
        source = self.sources[name]
        return source.make(*(self.container[key] for key in source.names))

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)

    def __contains__(self, name: object) -> bool:
        return name in self.sources  # Mapping's own would read the tensor

    def like(self, name: str) -> Tensor:
        """Return a tensor on the meta device: its shape and dtype, without reading it."""
        source = self.sources[name]
        return source.make(*(self.container.like(key) for key in source.names))

    def num_bytes(self, names: list[str]) -> int:
        """Number of bytes of the file that these tensors are made of, each counted once."""
        keys = {key for name in names for key in self.sources[name].names}
        return sum(self.container.places[key].num_bytes for key in keys)


def open_weights(path: Path, format: str, *, label: Label = WEIGHTS) -> Weights:
    """Open a weights file, an index or a folder in a named format (not `auto`: see choose.py).

    Raises UserError where it is missing, damaged, not of this format, or would run code.
    """
    formats: dict[str, list[str]] = {}
    for name, known in FORMATS.items():
        for entry in known.entries:
            formats.setdefault(entry, []).append(name)
    chosen = find_format(format, label=label)
    container = open_container(path, chosen.entries, formats, anchor=chosen.anchor, label=label)
    return map_names(container, format)


def map_names(container: Container, format: str) -> Weights:
    """Put a container under timm's names. Raises UserError where two names mean the same tensor."""
    label = container.label
    chosen = find_format(format, label=label)
    pieces: dict[str, dict[int, str]] = {}
    ignored = []
    for key in container:
        name = chosen.rename(key)
        if name is None:
            ignored.append(key)
            continue
        stem, _, number = name.partition("#")
        other = pieces.setdefault(stem, {}).setdefault(int(number or 0), key)
        if other != key:
            raise UserError(
                f"{label.weights} '{container.path}' holds {name} twice as format {format}: '{other}' and "
                f"'{key}'; keep the one that is meant"
            )
    sources = {}
    for name, keys in pieces.items():
        in_order = tuple(keys[number] for number in sorted(keys))
        sources[name] = Source(in_order, keep if len(keys) == 1 else join_pieces)
    return Weights(container, format, chosen.finish(sources), ignored)


# Parts of an MAE's decoder; other modules that were trained with the student are not part of a network.
_OWN_DECODER = re.compile(r"decoder\.((?:embed|pos_embed|blocks|norm|pred)(?:\.|$).*)")


def with_own_decoder(weights: Weights) -> Weights:
    """Join a student of ours with the decoder.safetensors next to it, under the published names.

    Files of other formats, and files with a decoder of their own, are returned as they are.
    """
    folder = weights.path if weights.path.is_dir() else weights.path.parent
    file = folder / "decoder.safetensors"
    has_decoder = any(name.startswith("decoder_") for name in weights)
    if weights.format != "dmae_ds" or has_decoder or not file.is_file():
        return weights
    decoder = open_container(file, label=weights.label)
    names = {}
    for name in decoder:
        published = "mask_token" if name == "decoder.mask_token" else _OWN_DECODER.sub(r"decoder_\1", name)
        if published != name:
            names[name] = published
    places = {name: decoder.places[name] for name in names}
    parts = [weights.container, Container(file, places, label=weights.label)]
    joined = join_containers(weights.path, parts, label=weights.label)
    joined.absent, joined.note = weights.container.absent, weights.container.note
    sources = {published: Source((name,), keep) for name, published in names.items()}
    return Weights(joined, weights.format, weights.sources | sources, weights.ignored)
