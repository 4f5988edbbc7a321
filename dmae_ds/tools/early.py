"""Mistakes in `dmae-ds teacher` that are found before torch is imported, in a fraction of a second."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from pydantic import ValidationError

from dmae_ds.config.networks import ModelConfig, known_format
from dmae_ds.config.own_file import network_in
from dmae_ds.config.run import RunConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.output.safetensors_header import read_header
from dmae_ds.train.preflight import check_teacher_file
from dmae_ds.weights.early import check_file
from dmae_ds.weights.label import TEACHER

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")  # of the encoder: a decoder's are decoder_blocks


def check_teacher(path: Path, *, name: str | None, overrides: list[str], format: str) -> None:
    """Raise UserError for a file that is not there or holds no weights, unknown keys, and another width."""
    path = path.expanduser()
    numbers = read_overrides(name, overrides)
    try:
        known_format(format)
    except ValueError as error:
        raise UserError(f"--format {error}") from None
    if not path.exists():
        raise UserError(
            f"teacher.weights '{path}' is not a file; give the path of a .safetensors, .pth, .pt, .bin file, "
            "an index, or a folder"
        )
    network = network_in(path) if name is None else {"name": name}
    check_file(path, ModelConfig(**{**network, **numbers}) if network else None, TEACHER)


def check_slice(path: Path, out: Path, *, num_stages: int, last_block: int | None) -> None:
    """Raise UserError where OUT exists, and for numbers by which the file's blocks can't be cut."""
    if out.expanduser().exists():
        raise UserError(f"'{out}' exists; choose another folder, or remove it")
    for option, number in (("--stages", num_stages), ("--last-block", last_block)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number} is too small; give 1 or more")
    path = path.expanduser()
    header = read_header(path) if path.is_file() else None
    blocks = {int(number) for name in (header.shapes if header else ()) for number in _BLOCK.findall(name)}
    if not blocks:
        return
    if last_block is not None and last_block > len(blocks):
        raise UserError(
            f"--last-block {last_block} is not one of the {len(blocks)} blocks of '{path}'; "
            f"give 1 to {len(blocks)}"
        )
    most = last_block or len(blocks)
    if num_stages > most:
        raise UserError(f"{most} blocks can't be cut into {num_stages} stages; give --stages 1 to {most}")


def check_stats(config: RunConfig, *, num_images: int, out: Path | None) -> None:
    """Raise UserError for a recipe without a teacher or data, and for a wrong file to write."""
    if config.teacher is None:
        raise UserError("this recipe has no teacher; name a recipe with a teacher section")
    if num_images < 1:
        raise UserError(f"--images {num_images} is too small; give 1 or more")
    if out is not None and out.suffix != ".safetensors":
        raise UserError(f"--out '{out}' does not end in .safetensors, which is what is written; rename it")
    ShardSet.open(config.data.train, label="data.train", access=Access.of(config.data))
    check_teacher_file(config.teacher)


def read_overrides(name: str | None, overrides: list[str]) -> dict:
    """Read the numbers of a network from key=value. Raises UserError with the known keys."""
    try:
        pairs = (text.partition("=") for text in overrides)
        values = {key: yaml.safe_load(value) for key, _, value in pairs}
        return ModelConfig(name=name or "unnamed", **values).overrides()
    except ValidationError as error:
        first = error.errors()[0]
        key, problem = ".".join(map(str, first["loc"])), first["msg"]
    except (yaml.YAMLError, TypeError) as error:
        key, problem = " ".join(overrides), str(error).replace("\n", " ")
    known = ", ".join(field for field in ModelConfig.model_fields if field != "name")
    raise UserError(f"{key}: {problem}; numbers of a network are {known}") from None
