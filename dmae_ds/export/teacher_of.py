"""Whose knowledge a student holds: its teacher, the identity of that one's weights, and the licence that is known of them.

A licence is never guessed from a name. It is known where somebody said it: the recipe (`teacher.license`), timm for weights
that timm itself fetched, the card in a Hugging Face folder. A teacher that this project trained passes on what it had.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import timm
from huggingface_hub import ModelCard, try_to_load_from_cache

from dmae_ds.config.load import read_saved_config
from dmae_ds.config.run import RunConfig, TeacherConfig, looks_like_hub_id
from dmae_ds.teacher.identity import read_sidecar

UNKNOWN = "unknown"


def describe_teacher(config: RunConfig) -> dict | None:
    """{"name", "overrides", "weights", "format", "sha256", "fingerprint", "license", "license_from", "teacher"}, or None without a teacher.

    sha256: of a single file; fingerprint: what `dmae-ds teacher inspect --write` stored beside it; None where there is none
    teacher: the teacher's own, where this project trained it
    """
    teacher = config.teacher
    if teacher is None:
        return None
    path = None if teacher.weights is None else Path(teacher.weights).expanduser()
    run = _run_of(path)
    above = describe_teacher(read_saved_config(run)) if run is not None else None
    licence, said_by = _licence(teacher, path, run, above)
    return {
        "name": teacher.name,
        "overrides": teacher.overrides(),
        "weights": teacher.weights or f"timm's {teacher.name}",
        "format": teacher.format,
        "sha256": _sha256(path),
        "fingerprint": _fingerprint(path),
        "license": licence,
        "license_from": said_by,
        "teacher": above,
    }


def _licence(
    teacher: TeacherConfig, path: Path | None, run: Path | None, above: dict | None
) -> tuple[str, str]:
    if teacher.license is not None:
        return teacher.license, "teacher.license of the recipe"
    if teacher.pretrained:
        return timm.get_pretrained_cfg(teacher.name).license or UNKNOWN, "timm's entry of the weights"
    if run is not None:
        return (
            (above["license"], "the teacher's own teacher")
            if above
            else ("none of others", f"trained by dmae-ds without a teacher, {run.name}")
        )
    if path is not None and not path.exists() and looks_like_hub_id(teacher.weights):
        found = try_to_load_from_cache(teacher.weights, "README.md")  # what is here; an export asks nobody
        return _licence_of_card(
            Path(found) if isinstance(found, str) else None
        ), "the card on the hub, as far as it was fetched"
    return _licence_of_card(
        None if path is None else (path if path.is_dir() else path.parent) / "README.md"
    ), "a card beside the weights"


def _licence_of_card(path: Path | None) -> str:
    if path is None or not path.is_file():
        return UNKNOWN
    try:
        return ModelCard.load(path).data.license or UNKNOWN
    except ValueError:  # a README of something else
        return UNKNOWN


def _run_of(path: Path | None) -> Path | None:
    """The run folder that these weights lie in, if they are a student of this project."""
    if path is None:
        return None
    folder = path if path.is_dir() else path.parent
    return (
        folder if (folder / "config.yaml").is_file() and (folder / "student.safetensors").is_file() else None
    )


def _sha256(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _fingerprint(path: Path | None) -> dict | None:
    if path is None or not path.exists():
        return None
    known = read_sidecar(path)
    return known and known["fingerprint"]
