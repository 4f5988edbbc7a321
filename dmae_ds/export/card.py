"""The facts of an export, as card.json holds them; `model_card.py` turns them into a page."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dmae_ds import __version__
from dmae_ds.config.saved import read_starts
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.errors import UserError
from dmae_ds.evaluate.results import read_results
from dmae_ds.export.source import STUDENTS, Source
from dmae_ds.export.teacher_facts import UNKNOWN, describe_initial, describe_teacher
from dmae_ds.train.checkpoint.folder import CheckpointFolder

CARD_VERSION = 1
TRAINED_ON = ("version", "commit", "python", "torch", "deepspeed", "timm", "device", "world_size")
LIBRARIES = ("torch", "timm", "safetensors", "transformers", "onnx", "onnxruntime", "onnxscript")


def make_card(
    source: Source, *, to: str, differences: dict[str, float], limits: dict[str, float], license: str
) -> dict:
    """Return everything that is known about an export, as plain values.

    differences, limits: {output: largest absolute difference, and what is allowed}
    license: of the exported weights, as the user stated it
    """
    data = source.evaluation["data"] if source.evaluation else source.config.data.model_dump(mode="json")
    fingerprint, fingerprint_from = _fingerprint_of_data(source, data["train"])
    return {
        "version": CARD_VERSION,
        "name": (source.run or source.results).resolve().name,
        "what": source.what,
        "to": to,
        "license": license,
        "student": {
            "name": source.name,
            "overrides": source.overrides,
            "keys": source.keys,
            "img_size": source.img_size,
            "patch_size": source.patch_size,
            "parameters": sum(parameter.numel() for parameter in source.vit.parameters()),
        },
        "step": source.step,
        "objective": None if source.config is None else source.config.objective.summary(),
        "teacher": _teacher_facts(source),
        "initial": None if source.config is None else describe_initial(source.config),
        "data": {
            "train": data["train"],
            "val": data["val"],
            "fingerprint": fingerprint,
            "fingerprint_from": fingerprint_from,
        },
        "metrics": read_results(source.results),
        "check": {
            "differences": differences,
            "largest": max(differences.values()),
            "limits": limits,
            "inputs": "standard normal pixels, float32, on the CPU",
        },
        "trained_on": _trained_on(source),
        "pixels": _pixels(source),
        "versions": {
            "dmae-ds": __version__,
            "python": platform.python_version(),
            **{name: number for name in LIBRARIES if (number := _version(name))},
        },
        "config": None if source.config is None else source.config.model_dump(mode="json"),
        "evaluation": source.evaluation,
    }


def _trained_on(source: Source) -> dict | None:
    """Versions, commit, device and ranks of the training's last start; None where none was recorded."""
    starts = [] if source.run is None else read_starts(source.run)
    return {name: starts[-1]["environment"].get(name) for name in TRAINED_ON} if starts else None


def _pixels(source: Source) -> dict:
    """What the network takes, and which of its tokens the objective is judged by."""
    pixels, pool = source.pixels, None
    if source.what in STUDENTS:
        pool = source.config.objective.judged_by
    return {
        "shape": [source.channels, source.img_size, source.img_size],
        "channels": f"{'RGB' if source.channels == 3 else 'as stored'}, from 0 to 1 before mean and std",
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "crop_pct": pixels.crop_pct,
        "pool": pool,
    }


def _teacher_facts(source: Source) -> dict | None:
    """Return the facts of the pre-training's teacher.

    For a classifier without a run, they are those of the weights that it started from.
    """
    if source.config is not None:
        return describe_teacher(source.config)
    weights = {key: None for key in ("sha256", "fingerprint", "teacher")}
    return {
        "name": source.name,
        "overrides": source.overrides,
        "weights": source.evaluation["weights"],
        "format": source.evaluation["format"],
        "license": UNKNOWN,
        "license_from": "the fine-tuned weights are not from a run of dmae-ds",
        **weights,
    }


def _fingerprint_of_data(source: Source, train: str) -> tuple[str, str]:
    """Return the training shards' fingerprint and where it is from.

    It is from the newest checkpoint or, without one, from the shards as they are now.
    """
    reasons = []
    if source.run is not None:
        folder = CheckpointFolder(source.run)
        try:
            latest = folder.latest()
            if latest is not None:
                return folder.read_state(latest)["fingerprint"], "the newest checkpoint"
            reasons.append("no checkpoint")
        except UserError as error:
            reasons.append(str(error))
    path = Path(train).expanduser()
    if path.is_dir():  # shards behind a URL are not opened
        try:
            shards = ShardSet.open(str(path), label="data.train")
            return shards.fingerprint, "the shards in data.train, as they are now"
        except UserError as error:
            reasons.append(str(error))
    return UNKNOWN, "; ".join(reasons)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
