"""The starts that a run folder keeps (RUN/starts.jsonl), and the paths of its recipe, from any folder.

A recipe's relative paths mean the folder in which the run was started. So an evaluation finds the data of a
run in whatever folder it is typed, and wherever the run folder was moved to.
"""

from __future__ import annotations

import json
from pathlib import Path

from dmae_ds.config.networks import looks_like_hub_id
from dmae_ds.config.objective_base import Section
from dmae_ds.config.run import RunConfig

FILE = "starts.jsonl"
# Keys that may hold a path: {section: keys}.
PATHS = {"data": ("train", "val"), "student": ("weights",)}
TEACHER_PATHS = ("weights", "stats", "cache")


def read_starts(run_dir: Path) -> list[dict]:
    """The starts of a run, the oldest first (train/starts.py writes them).

    [] where none is recorded, as before December 2026. Half a line of a killed start is left out.
    """
    path = run_dir / FILE
    starts = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            starts.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return starts


def with_paths_from_here(config: RunConfig, run_dir: Path) -> RunConfig:
    """The config of a run with its relative paths as they are found from the current folder.

    They are taken from the folder of the run's last start; where nothing is there, from the current folder.
    What is in neither stays a path in the folder of the start, which the message about it then names.
    """
    starts = read_starts(run_dir)
    folder = Path(starts[-1]["environment"]["folder"]) if starts else Path.cwd()
    if folder == Path.cwd():
        return config
    changed: dict[str, object] = {
        name: _from_here(getattr(config, name), keys, folder) for name, keys in PATHS.items()
    }
    teachers = config.named_teachers()
    config = config.with_teachers(
        {name: _from_here(teacher, TEACHER_PATHS, folder) for name, teacher in teachers.items()}
    )
    if config.deepspeed.endswith(".json"):
        changed["deepspeed"] = find_path(config.deepspeed, folder)
    return config.model_copy(update=changed)


def _from_here(section: Section, keys: tuple[str, ...], folder: Path) -> Section:
    values = {key: find_path(getattr(section, key), folder, may_be_hub_id=key == "weights") for key in keys}
    return section.model_copy(update=values)


def find_path(text: str | None, folder: Path, *, may_be_hub_id: bool = False) -> str | None:
    """A path that was written in `folder`, as it is found from the current folder; URLs and hub ids stay."""
    if text is None or "://" in text or text.startswith("pipe:") or Path(text).expanduser().is_absolute():
        return text
    there = folder / text
    if not there.exists() and (Path(text).exists() or (may_be_hub_id and looks_like_hub_id(text))):
        return text
    return str(there)
