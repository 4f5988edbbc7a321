"""What `dmae-ds eval finetune` and `eval linear` were given: a run folder or a weights file, a recipe, overrides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dmae_ds.config.evaluation import ClassifierConfig
from dmae_ds.config.load import load_config, read_saved_config
from dmae_ds.config.run import looks_like_hub_id
from dmae_ds.errors import UserError
from dmae_ds.weights.containers import open_container
from dmae_ds.weights.hub import locate
from dmae_ds.weights.label import WEIGHTS
from dmae_ds.weights.metadata import own_network_if_readable

Config = TypeVar("Config", bound=ClassifierConfig)
_BESIDE = "?"  # run.dir of a run folder's evaluation, until its labels are known


@dataclass(frozen=True)
class Source:
    """config: the recipe, complete; file: the weights; results: the folder whose results.jsonl gets the number."""

    config: ClassifierConfig
    recipe: str
    file: Path
    results: Path


def find_source(
    word: str,
    *,
    schema: type[Config],
    recipe: str,
    overrides: list[str],
    labels: str,
    subset_seed: int | None,
) -> Source:
    """Join what the weights say of themselves, the recipe and the overrides, the later over the earlier.

    word: a run folder, which gives network, data, seed and the place of the result; or a weights file or hub id, for which the
    overrides give data.train, data.val and run.dir, and network.name where the file doesn't say
    Raises UserError.
    """
    path, stem = Path(word).expanduser(), Path(recipe).stem
    below = {"weights": word, "labels": labels, "subset_seed": subset_seed}
    run = path if path.is_dir() and (path / "config.yaml").is_file() else None
    if run is not None:
        file = run / "student.safetensors"
        if not file.is_file():
            raise UserError(
                f"'{file}' is not there; a training run writes it with its first checkpoint; for the result of an evaluation name its best.safetensors"
            )
        trained = read_saved_config(run)
        below |= {
            "run": {"dir": _BESIDE, "seed": trained.run.seed},
            "network": trained.student.model_dump(exclude_none=True, exclude={"weights"}),
            "data": trained.data.model_dump(mode="json"),
        }
    else:
        file = _find_file(word)
        own = own_network_if_readable(open_container(file)) if file.suffix == ".safetensors" else None
        below |= {"run": {}, "data": {}, "network": {} if own is None else {"name": own[0], **own[1]}}
    config = load_config(recipe, overrides, schema=schema, kind="evaluation recipe", below=below)
    if config.run.dir == _BESIDE:
        drawn = "" if config.labels == "all" else f"-{config.labels}-seed{config.subset_seed or 0}"
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": str(run / f"{stem}{drawn}")})}
        )
    folder = Path(config.run.dir).expanduser()
    return Source(config, stem, file, run if run is not None else folder)


def _find_file(word: str) -> Path:
    if not Path(word).expanduser().exists() and not looks_like_hub_id(word):
        raise UserError(
            f"'{word}' is neither a run folder nor a weights file; give one that `dmae-ds train` wrote, a .safetensors or .pth file, or a hub id"
        )
    return locate(word, label=WEIGHTS)
