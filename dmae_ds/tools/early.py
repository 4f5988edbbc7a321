"""Mistakes in `dmae-ds teacher` that are found before torch is imported, in a fraction of a second."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import yaml
from pydantic import ValidationError

from dmae_ds.config.family import check_one_student
from dmae_ds.config.networks import ModelConfig, known_format
from dmae_ds.config.own_file import network_in
from dmae_ds.config.run import EvalConfig, LogConfig, RunConfig
from dmae_ds.data.order import num_steps
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.distributed.world import World
from dmae_ds.errors import UserError
from dmae_ds.output.new_path import refuse_existing
from dmae_ds.output.safetensors_header import read_header
from dmae_ds.teacher.cache_layout import CODEC, STORED
from dmae_ds.teacher.cache_manifest import MANIFEST, Manifest, check_same, read_manifest, recipe_identity
from dmae_ds.train.preflight import Preflight, check_teacher_file, prepare
from dmae_ds.weights.early import check_file
from dmae_ds.weights.label import TEACHER

# What a start of `dmae-ds teacher cache` leaves that ended before the manifest was written.
LEFT_OVER = ("lock", "corrupt.jsonl", CODEC, f"{CODEC}.tmp", f"{MANIFEST}.tmp")

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
    existing = refuse_existing(out.expanduser(), name="OUT", reads=path)
    if existing:
        raise UserError(existing)
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
    check_one_student(config, "teacher stats")
    teachers = config.named_teachers()
    if not teachers:
        raise UserError("this recipe has no teacher; name a recipe with a teacher section")
    if num_images < 1:
        raise UserError(f"--images {num_images} is too small; give 1 or more")
    if out is None and len(teachers) > 1:
        files = [teacher.weights or teacher.name for teacher in teachers.values()]
        if len(set(files)) < len(files):
            raise UserError(
                f"several of the teachers {', '.join(teachers)} have the same weights, next to which is room "
                "for one file of statistics; give --out FOLDER, which gets a file for each"
            )
    if out is not None and config.teachers is not None and out.exists() and not out.is_dir():
        raise UserError(
            f"--out '{out}' is a file; of several teachers give a folder, which gets one for each"
        )
    if out is not None and config.teachers is None and out.suffix != ".safetensors":
        raise UserError(f"--out '{out}' does not end in .safetensors, which is what is written; rename it")
    for file in [] if out is None else [stats_file(out, name) for name in teachers]:
        header = read_header(file) if file.is_file() else None
        if os.path.lexists(file) and (header is None or "about" not in header.metadata):
            raise UserError(f"'{file}' exists and holds no statistics of features; choose another --out")
    ShardSet.open(config.data.train, label="data.train", access=Access.of(config.data))
    for teacher in teachers.values():
        check_teacher_file(teacher)


def stats_file(out: Path, name: str) -> Path:
    """The file that `teacher stats --out` writes about a teacher: `out`, or of several teachers one in it."""
    return out / f"{name}.stats.safetensors" if name else out


@dataclass(frozen=True)
class CacheRequest:
    """Arguments of `dmae-ds teacher cache`.

    epochs: None: those of the run; dtype: fp32, bf16, fp16, int8, or None, the features' own
    pca: dimensions that are kept; None: all
    teacher: the name of one of several; "": the recipe has one
    """

    out: Path
    epochs: float | None = None
    dtype: str | None = None
    pca: int | None = None
    teacher: str = ""


def prepare_cache(config: RunConfig, world: World, request: CacheRequest) -> Preflight:
    """Check a recipe whose teacher's features are to be stored, as `train` would, without its evaluations.

    A cache that exists decides the micro-batch. Raises UserError.
    """
    teachers = config.named_teachers()
    if not teachers:
        raise UserError("this recipe has no teacher; name a recipe with a teacher section")
    if request.teacher not in teachers:
        known = ", ".join(teachers) if "" not in teachers else "one without a name: leave --teacher out"
        raise UserError(f"--teacher '{request.teacher}' is not one of the recipe's; it has {known}")
    teacher = teachers[request.teacher]
    if teacher.placement == "cache":
        raise UserError(
            f"{teacher.key('placement')}=cache reads features instead of computing them; leave it out to "
            "write a cache"
        )
    if request.epochs is not None and not 0 < request.epochs < inf:
        raise UserError(f"--epochs {request.epochs:g} is not a length; give a finite number above 0")
    if request.pca is not None and request.pca < 1:
        raise UserError(f"--pca {request.pca} is too small; give 1 or more")
    manifest = existing_manifest(request.out)
    lane_rows = config.optim.micro_batch if manifest is None else manifest.layout.lane_rows
    config = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(request.out)}),
            "optim": config.optim.model_copy(update={"micro_batch": lane_rows}),
            "eval": EvalConfig(),
            "log": LogConfig(trackers=[]),
        }
    )
    preflight = prepare(config, world, resume="never")
    recipe_identity(config, teacher, preflight.shards)  # refuses data without an exact order
    if manifest is not None and preflight.micro_batch != lane_rows:
        raise UserError(
            f"OUT '{request.out}' was begun with micro-batches of {lane_rows} images, which do not cut the "
            f"batch for {world.size} ranks; use another number of ranks, or another OUT"
        )
    epochs = config.optim.epochs if request.epochs is None else request.epochs
    steps = num_steps(epochs, preflight.num_images, config.optim.global_batch)
    if manifest is not None:
        _check_request(manifest, request, steps)
    return replace(preflight, num_steps=steps)


def existing_manifest(out: Path) -> Manifest | None:
    """The manifest in OUT; None where OUT is new or empty. Raises UserError where it holds something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"OUT '{out}' is a file; give a folder")
    if (out / MANIFEST).exists():
        return read_manifest(str(out), access=Access())
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    others = [name for name in names if name not in LEFT_OVER]
    if others:
        raise UserError(f"OUT '{out}' holds {others[0]} and no cache; give a new or empty folder")
    return None


def _check_request(manifest: Manifest, request: CacheRequest, steps: int) -> None:
    """Raise UserError where OUT holds features of another length or in another dtype."""
    layout = manifest.layout
    now, stored = {"--epochs (steps)": steps}, {"--epochs (steps)": layout.num_steps}
    for tap in layout.taps:
        dtype = tap.dtype if request.dtype is None else STORED[request.dtype]
        now[f"--dtype of {tap.name}"], stored[f"--dtype of {tap.name}"] = dtype, tap.stored
        width = tap.shape[-1] if request.pca is None else request.pca
        now[f"dimensions of {tap.name}"], stored[f"dimensions of {tap.name}"] = width, tap.width
    check_same(stored, now, where=f"OUT '{request.out}'")


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
