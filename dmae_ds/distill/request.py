"""What `dmae-ds distill` was asked for, and whether a run folder was begun for the same (no torch)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dmae_ds.config.yaml_text import OverrideText
from dmae_ds.errors import UserError
from dmae_ds.train.checkpoint.folder import CheckpointFolder

RECIPE, ASKED = "recipe.yaml", "distill.json"  # in the run folder; the recipe is written last

# Keys that the arguments set: {key: argument}.
SET_BY = {
    "data.train": "FOLDER",
    "student.name": "--student",
    "teacher.weights": "--teacher",
    "teacher.pretrained": "--teacher",
}


@dataclass(frozen=True)
class Request:
    """The arguments of the command.

    images: a folder of images, or of shards
    teacher: a file, a folder, a hub id, or timm's name; student: timm's name
    epochs, ranks: None: by the rules; shards: where they are made; None: next to the images
    max_skip: unusable images that are left out
    overrides: `key=value`
    """

    images: Path
    teacher: str
    student: str
    epochs: float | None = None
    shards: Path | None = None
    ranks: int | None = None
    max_skip: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self):
        """Raise UserError for an override of a key that an argument sets, alone or with its whole section."""
        keys = {override.partition("=")[0] for override in self.overrides if "=" in override}
        for key, argument in SET_BY.items():
            if key in keys:
                raise UserError(f"{key} is set by {argument} here; remove the override {key}=")
        if self.epochs is not None and "optim.epochs" in keys:
            raise UserError("--epochs and optim.epochs= are both given; remove one of them")
        sections = {key.partition(".")[0]: argument for key, argument in SET_BY.items()}
        sections |= {"run": "run.dir"} | ({} if self.epochs is None else {"optim": "--epochs"})
        for section in sorted(keys & sections.keys()):
            raise UserError(
                f"{section}= replaces a whole section, and {sections[section]} sets a key of it; write keys "
                f"one by one, such as {section}.{'dir' if section == 'run' else 'KEY'}="
            )

    @property
    def gives_val(self) -> bool:
        """Whether data.val is given, if only as null."""
        return any(override.startswith("data.val=") for override in self.overrides)

    @property
    def all_overrides(self) -> list[str]:
        """The overrides, with `--epochs` as one of them."""
        epochs = [] if self.epochs is None else [f"optim.epochs={self.epochs:g}"]
        return [*self.overrides, *epochs]

    @property
    def run_dir(self) -> Path:
        """The run folder: run.dir=, or runs/FOLDER-STUDENT in the working folder."""
        given = [
            text for key, _, text in (word.partition("=") for word in self.overrides) if key == "run.dir"
        ]
        name = OverrideText("run.dir", given[-1]).as_string() if given else None
        name = name or f"runs/{self.images.expanduser().resolve().name}-{self.student.split('.')[0]}"
        return Path(name).expanduser().absolute()

    @property
    def shards_dir(self) -> Path:
        """Where shards are made: FOLDER-shards next to FOLDER, unless another folder was given."""
        images = self.images.expanduser().resolve()
        return (self.shards or images.with_name(f"{images.name}-shards")).expanduser().absolute()

    def asked(self) -> dict:
        """What decides the recipe, as plain values; ranks may change from start to start."""
        teacher = Path(self.teacher).expanduser()
        return {
            "FOLDER": str(self.images.expanduser().resolve()),
            "--teacher": str(teacher.resolve()) if teacher.exists() else self.teacher,
            "--student": self.student,
            "--epochs": self.epochs,
            "--shards": str(self.shards_dir),
            "--max-skip": self.max_skip,
            "key=value": sorted(self.overrides),
        }


def find_begun(request: Request) -> Path | None:
    """The recipe of a run that was begun for the same request; None where it must be made.

    A run without a checkpoint may be begun again with other options.
    Raises UserError where a run with checkpoints was begun for another request, or without `distill`.
    """
    run_dir = request.run_dir
    recipe, asked = run_dir / RECIPE, run_dir / ASKED
    has_trained = bool(CheckpointFolder(run_dir).all())
    if not recipe.is_file() or not asked.is_file():
        if has_trained or (run_dir / "student.safetensors").exists():
            raise UserError(
                f"'{run_dir}' holds a run that was not begun by dmae-ds distill; choose another run.dir="
            )
        return None
    try:
        before = dict(json.loads(asked.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"'{asked}' is damaged; continue with: {continue_by_train(recipe)}") from None
    now = request.asked()
    changed = _changes(before, now)
    if not changed:
        return recipe
    if not has_trained:
        return None
    raise UserError(
        f"'{run_dir}' was begun with {changed}; repeat the command as it was, choose another run.dir=, or "
        f"change the run's own recipe: {continue_by_train(recipe)} key=value"
    )


def _changes(before: dict, now: dict) -> str:
    """What differs between two requests, `--epochs 2.0, now 3.0; ...`, and of overrides those that differ."""
    texts = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, list) and isinstance(old, list):
            old, value = (
                " ".join(word for word in words if word not in others) or "none"
                for words, others in ((old, value), (value, old))
            )
        if old != value:
            texts.append(f"{key} {old}, now {value}")
    return "; ".join(texts)


def continue_by_train(recipe: Path) -> str:
    """The command that continues a run from its recipe."""
    return f"dmae-ds train {recipe} --resume auto"
