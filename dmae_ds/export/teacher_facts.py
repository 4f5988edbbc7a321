"""Facts about the weights that a student learnt or began from: their identity, and their licence if stated.

A licence is never guessed from a name. It is stated in the recipe (`teacher.license`), by timm for weights
that timm downloaded, or in the card of a Hugging Face folder. A teacher that this project trained has the
licence of its own teacher, and of the weights that it began from.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import timm
from huggingface_hub import ModelCard, try_to_load_from_cache

from dmae_ds.config.load import read_saved_config
from dmae_ds.config.networks import TeacherConfig, looks_like_hub_id
from dmae_ds.config.run import RunConfig
from dmae_ds.teacher.identity import read_sidecar

UNKNOWN = "unknown"


def describe_teacher(config: RunConfig) -> dict | None:
    """Return the facts of a run's teacher, or None without a teacher.

    {"name", "overrides", "weights", "format", "sha256", "fingerprint", "license", "license_from", "teacher"}
    sha256: of a single file, otherwise None
    fingerprint: what `dmae-ds teacher inspect --write` stored next to the file, otherwise None
    teacher: the same facts of the teacher's own teacher, where this project trained it
    Of several teachers {"teachers": the facts of each by its name, "license", "license_from": of all}.
    """
    if config.teachers is None:
        return None if config.teacher is None else _facts_of(config.teacher)
    each = {name: _facts_of(teacher) for name, teacher in config.named_teachers().items()}
    licence, stated_by = _licence_of_all(each)
    return {"teachers": each, "license": licence, "license_from": stated_by}


def _facts_of(teacher: TeacherConfig) -> dict:
    path = None if teacher.weights is None else Path(teacher.weights).expanduser()
    run = _run_of(path)
    above = describe_teacher(read_saved_config(run, student_only=True)) if run is not None else None
    licence, stated_by = _licence(teacher, path, run, above)
    return {
        "name": teacher.name,
        "overrides": teacher.overrides(),
        "weights": teacher.weights or _without_file(teacher),
        "format": teacher.format,
        "sha256": _sha256(path),
        "fingerprint": _fingerprint(path),
        "license": licence,
        "license_from": stated_by,
        "teacher": above,
    }


def _licence_of_all(stated: dict[str, dict]) -> tuple[str, str]:
    """The licences of several things by name, and who states them; those that differ are all named."""
    if len({facts["license"] for facts in stated.values()}) == 1:
        return next(iter(stated.values()))["license"], " and ".join(stated)
    text = "; ".join(f"{facts['license']} ({name})" for name, facts in stated.items())
    return text, "; ".join(f"{name}: {facts['license_from']}" for name, facts in stated.items())


def describe_initial(config: RunConfig) -> dict | None:
    """Return the facts of the weights that a student began from (`student.weights`), or None without any.

    {"weights", "sha256", "license", "license_from", "teacher", "initial"}; teacher and initial: the facts of
    the run that wrote them, None where no run of this project did
    """
    weights = config.student.weights
    if weights is None:
        return None
    path = Path(weights).expanduser()
    run = _run_of(path)
    before = None if run is None else read_saved_config(run, student_only=True)
    teacher, initial = (
        (None, None) if before is None else (describe_teacher(before), describe_initial(before))
    )
    if run is None:
        licence, stated_by = _licence_of_place(path, weights)
    else:
        licence, stated_by = _licence_of_run(run, teacher, initial)
    return {
        "weights": weights,
        "sha256": _sha256(path),
        "license": licence,
        "license_from": stated_by,
        "teacher": teacher,
        "initial": initial,
    }


def _licence_of_run(run: Path, teacher: dict | None, initial: dict | None) -> tuple[str, str]:
    """The licences of what a run's student learnt and began from; two that differ are both named."""
    stated = {"its teacher": teacher, "its initial weights": initial}
    licences = {whose: facts["license"] for whose, facts in stated.items() if facts is not None}
    if not licences:
        return "none of others", f"run {run.name} of dmae-ds, which had no teacher"
    if len(set(licences.values())) == 1:
        return next(iter(licences.values())), f"run {run.name} of dmae-ds: {' and '.join(licences)}"
    text = "; ".join(f"{licence} ({whose})" for whose, licence in licences.items())
    return text, f"run {run.name} of dmae-ds"


def _licence(
    teacher: TeacherConfig, path: Path | None, run: Path | None, above: dict | None
) -> tuple[str, str]:
    if teacher.license is not None:
        return teacher.license, f"{teacher.key('license')} of the recipe"
    if teacher.pretrained:
        return timm.get_pretrained_cfg(teacher.name).license or UNKNOWN, "timm's entry of the weights"
    if run is not None:
        initial = describe_initial(read_saved_config(run, student_only=True))
        if above and initial is None:
            return above["license"], "the teacher's own teacher"
        return _licence_of_run(run, above, initial)
    return _licence_of_place(path, teacher.weights)


def _without_file(teacher: TeacherConfig) -> str:
    """Where a teacher without a file of weights is from: timm, or features that were stored."""
    return f"features stored in {teacher.cache}" if teacher.cache else f"timm's {teacher.name}"


def _licence_of_place(path: Path | None, weights: str | None) -> tuple[str, str]:
    if path is not None and not path.exists() and looks_like_hub_id(weights):
        cached = try_to_load_from_cache(weights, "README.md")  # an export does not use the network
        card = Path(cached) if isinstance(cached, str) else None
        return _licence_of_card(card), "the downloaded card of the hub"
    folder = path if path is None or path.is_dir() else path.parent
    return _licence_of_card(None if folder is None else folder / "README.md"), "a card next to the weights"


def _licence_of_card(path: Path | None) -> str:
    if path is None or not path.is_file():
        return UNKNOWN
    try:
        return ModelCard.load(path).data.license or UNKNOWN
    except ValueError:  # a README that is no model card
        return UNKNOWN


def _run_of(path: Path | None) -> Path | None:
    """Return the run folder that these weights are in; None where they are no student of this project."""
    if path is None:
        return None
    folder = path if path.is_dir() else path.parent
    is_run = (folder / "config.yaml").is_file() and (folder / "student.safetensors").is_file()
    return folder if is_run else None


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
