"""Numbers of a teacher that was trained here, from the metadata of its file (no torch)."""

from __future__ import annotations

import json
from pathlib import Path

from dmae_ds.config.networks import ModelConfig, TeacherConfig
from dmae_ds.config.run import RunConfig
from dmae_ds.output.safetensors_header import read_header

_FORMATS = ("dmae_ds", "auto")
_STUDENT = "student.safetensors"  # in a run folder


def with_numbers_of_own_file(config: RunConfig) -> RunConfig:
    """The config with `teacher.depth` and so on of a file that was written here, if the recipe gives none.

    A file of another network than `teacher.name`, and one that can't be read, change nothing here: they are
    refused where the teacher is built.
    """
    numbered = {}
    for name, teacher in config.named_teachers().items():
        numbers: dict[str, object] = {}
        if teacher.weights is not None and teacher.format in _FORMATS and not teacher.overrides():
            numbers = _numbers_in(Path(teacher.weights).expanduser(), teacher)
        numbered[name] = teacher.model_copy(update=numbers if set(numbers) - {"img_size"} else {})
    return config.with_teachers(numbered)


def network_in(path: Path) -> dict[str, object]:
    """{"name": timm's, "depth": ...} of a .safetensors file that was written here; {} for other files."""
    header = read_header(path) if path.is_file() else None
    try:
        return {"name": header.metadata["timm_name"], **json.loads(header.metadata["timm_overrides"])}
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def _numbers_in(path: Path, teacher: TeacherConfig) -> dict[str, object]:
    network = network_in(path / _STUDENT if path.is_dir() else path)
    if str(network.get("name")).split(".")[0] != teacher.name.split(".")[0]:
        return {}
    try:
        return ModelConfig.model_validate({**network, "name": teacher.name}).overrides()
    except ValueError:
        return {}
