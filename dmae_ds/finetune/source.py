"""Input of an evaluation that trains: a run folder or weights file, a recipe, overrides.

It is found without torch, so that a mistake is (early.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from isal import isal_zlib

from dmae_ds.config.dense import DenseConfig
from dmae_ds.config.evaluation import ClassifierConfig
from dmae_ds.config.load import flatten, load_config, read_saved_config
from dmae_ds.config.networks import looks_like_hub_id
from dmae_ds.config.own_file import network_in
from dmae_ds.config.shipped import find_file, shipped_files
from dmae_ds.errors import UserError
from dmae_ds.weights.content import UNIT, identify
from dmae_ds.weights.hub import locate
from dmae_ds.weights.label import WEIGHTS

Config = TypeVar("Config", bound=ClassifierConfig | DenseConfig)
# Keys that may differ between a run and its continuation: locations, and settings that only change the speed.
FREE_KEYS = {
    "run.dir",
    "weights",
    "format",
    "optim.micro_batch",
    "precision",
    "tf32",
    "run.deterministic",
    "distill.teacher",
    "data.train",
    "data.val",
    "data.num_workers",
    "data.buffer_gib",
    "data.retries",
    "data.timeout_s",
    "data.cache_dir",
    "data.cache_gib",
    "data.max_corrupt",
    "data.shuffle_buffer",
}
# Keys of recipes that `settings` of results.jsonl have under names of their own, and of the weights' place.
_IN_SETTINGS = {
    "labels",
    "subset_seed",
    "pool",
    "init",
    "ema",
    "drop_path",
    "frozen",
    "run.seed",
    "optim.epochs",
    "optim.length",
    "optim.unit",
    "optim.global_batch",
    "optim.base_lr",
    "optim.lr",
    "optim.layer_decay",
    "head.name",
    "detector.pyramid",
    "detector.window",
    "detector.heads",
}
_PLACES = ("weights=", "format=", "network.", "run.", "data.train=", "data.val=", "distill.teacher=")
KIND = "evaluation recipe"
TEACHER = "teacher"  # a key of a result's settings
_IN_RUN = "?"  # run.dir of a run folder's evaluation, until its labels are known


@dataclass(frozen=True)
class Source:
    """A complete recipe and its weights.

    file: the weights; results: the folder whose results.jsonl gets the line
    changed: {"changed": the options that the recipe of this name has otherwise}, or {}: part of `settings`
    """

    config: ClassifierConfig | DenseConfig
    recipe: str  # its name; of a recipe that isn't shipped also a number of its content
    file: Path
    results: Path
    changed: dict[str, str] = field(default_factory=dict)

    def contents(self) -> dict[str, list[int]]:
        """What identifies the weights' files: a continued run must have it in common with the killed one."""
        files = {} if getattr(self.config, "init", "weights") == "random" else {"weights": self.file}
        distill = getattr(self.config, "distill", None)
        if distill is not None and Path(distill.teacher).expanduser().exists():
            files["distill.teacher"] = Path(distill.teacher).expanduser()
        return {f"{name} {UNIT}": identify(file) for name, file in files.items()}

    def teacher(self) -> dict[str, str]:
        """The part of a result's settings that tells teachers apart; {} without distillation."""
        distill = getattr(self.config, "distill", None)
        if distill is None:
            return {}
        file = Path(distill.teacher).expanduser()
        return {TEACHER: f"{identify(file)[1]:08x}" if file.exists() else distill.teacher}


def find_source(
    word: str,
    *,
    schema: type[Config],
    recipe: str,
    overrides: list[str],
    labels: str | None = None,
    subset_seed: int | None = None,
) -> Source:
    """Join the settings that come with the weights, the recipe and the overrides.

    Later ones replace earlier ones.
    word: a run folder, which gives network, data, seed and the place of the result; or a weights file or hub
    id, for which the overrides give data.train, data.val and run.dir, and network.name if the file does not
    have it
    labels, subset_seed: of a classifier's training images; None for dense tasks
    Raises UserError.
    """
    path, stem = Path(word).expanduser(), Path(recipe).stem
    below = {"weights": word}
    if labels is not None:
        below |= {"labels": labels, "subset_seed": subset_seed}
    run = path if path.is_dir() and (path / "config.yaml").is_file() else None
    if run is not None:
        file = run / "student.safetensors"
        if not file.is_file():
            raise UserError(
                f"'{file}' not found; a training run writes it with its first checkpoint. "
                "To evaluate the result of an evaluation, name its best.safetensors"
            )
        trained = read_saved_config(run, student_only=True)
        below |= {
            "run": {"dir": _IN_RUN, "seed": trained.run.seed},
            "network": trained.student.model_dump(
                exclude_none=True, exclude={"weights", "checkpoint_blocks"}
            ),
            "data": trained.data.model_dump(
                mode="json", include=set(schema.model_fields["data"].annotation.model_fields) - {"repeat"}
            ),
        }
    else:
        file = _find_file(word)
        below |= {"run": {}, "data": {}, "network": network_in(file)}
    config = load_config(recipe, overrides, schema=schema, kind=KIND, below=below)
    if config.weights != word:
        raise UserError(f"weights is '{config.weights}', and the command names '{word}'; remove `weights`")
    if config.run.dir == _IN_RUN:
        drawn = "" if labels is None or config.labels == "all" else _drawn(config)
        run_section = config.run.model_copy(update={"dir": str(run / f"{stem}{drawn}")})
        config = config.model_copy(update={"run": run_section})
    folder = Path(config.run.dir).expanduser()
    changed = {}
    if not all(override.startswith(_PLACES) for override in overrides):
        plain = [override for override in overrides if override.startswith(_PLACES)]
        try:
            usual = load_config(recipe, plain, schema=schema, kind=KIND, below=below)
        except UserError:  # the recipe has no value of its own
            usual = config
        changed = _list_changed(config, usual)
    return Source(config, _name_recipe(recipe), file, run if run is not None else folder, changed)


def _name_recipe(recipe: str) -> str:
    path = find_file(KIND, recipe)
    is_shipped = path.resolve() in (file.resolve() for file in shipped_files(KIND).values())
    return path.stem if is_shipped else f"{path.stem} {isal_zlib.crc32(path.read_bytes()):08x}"


def _list_changed(config: ClassifierConfig | DenseConfig, plain: ClassifierConfig | DenseConfig) -> dict:
    """Which options differ from those of the recipe alone and are not in a result's settings, as text."""
    given, usual = (flatten(one.model_dump(mode="json")) for one in (config, plain))
    differing = [
        f"{key} {json.dumps(value)}"
        for key, value in given.items()
        if key in usual and usual[key] != value and key not in FREE_KEYS | _IN_SETTINGS
    ]
    return {"changed": ", ".join(differing)} if differing else {}


def _drawn(config: ClassifierConfig) -> str:
    """The part of a folder's name that tells draws of labels apart."""
    return f"-{config.labels}-seed{config.subset_seed or 0}"


def _find_file(word: str) -> Path:
    if not Path(word).expanduser().exists() and not looks_like_hub_id(word):
        raise UserError(
            f"'{word}' is neither a run folder nor a weights file; "
            "give a run of `dmae-ds train`, a .safetensors or .pth file, or a hub id"
        )
    return locate(word, label=WEIGHTS)
