"""Input of an evaluation that trains: a run folder or weights file, a recipe, overrides.

It is found without torch, so that a mistake is (early.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dmae_ds.config.dense import DenseConfig
from dmae_ds.config.evaluation import ClassifierConfig
from dmae_ds.config.load import load_config, read_saved_config
from dmae_ds.config.networks import looks_like_hub_id
from dmae_ds.config.own_file import network_in
from dmae_ds.errors import UserError
from dmae_ds.weights.hub import locate
from dmae_ds.weights.label import WEIGHTS

Config = TypeVar("Config", bound=ClassifierConfig | DenseConfig)
_IN_RUN = "?"  # run.dir of a run folder's evaluation, until its labels are known


@dataclass(frozen=True)
class Source:
    """A complete recipe and its weights.

    file: the weights; results: the folder whose results.jsonl gets the line
    """

    config: ClassifierConfig | DenseConfig
    recipe: str
    file: Path
    results: Path


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
                mode="json", include=set(schema.model_fields["data"].annotation.model_fields)
            ),
        }
    else:
        file = _find_file(word)
        below |= {"run": {}, "data": {}, "network": network_in(file)}
    config = load_config(recipe, overrides, schema=schema, kind="evaluation recipe", below=below)
    if config.run.dir == _IN_RUN:
        drawn = "" if labels is None or config.labels == "all" else _drawn(config)
        run_section = config.run.model_copy(update={"dir": str(run / f"{stem}{drawn}")})
        config = config.model_copy(update={"run": run_section})
    folder = Path(config.run.dir).expanduser()
    return Source(config, stem, file, run if run is not None else folder)


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
