"""What k-NN and the probe have in common: a run's frozen features with their labels, and the line that they write."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dmae_ds.config.load import read_saved_config
from dmae_ds.distributed.device import device_name
from dmae_ds.errors import UserError
from dmae_ds.evaluate.feature_cache import FeatureCache
from dmae_ds.evaluate.features import POOLS, Processes, load_student, precision_of, read_step
from dmae_ds.evaluate.results import append_result
from dmae_ds.evaluate.subsets import ALL, check_labels, open_labelled, open_subset


@dataclass(frozen=True)
class FrozenFeatures:
    """Features [n, D] float32 and classes [n] int64 of the labelled training pictures and of all validation pictures."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    num_classes: int
    about: dict  # the fields of a result that are known by now


def open_frozen(
    run: Path,
    *,
    labels: str,
    subset_seed: int | None,
    pool: str,
    batch_size: int,
    cache_gib: float,
    processes: Processes,
    least_train: int = 1,
) -> FrozenFeatures:
    """Read a run's student and embed its data, or take both from RUN/features. Collective.

    labels, subset_seed: which training pictures count (evaluate/subsets.py); cache_gib: bound on RUN/features, 0: no cache
    least_train: how many of them are needed
    Raises UserError for a run without labelled data, or numbers that mean nothing.
    """
    if batch_size < 1 or cache_gib < 0 or pool not in POOLS:
        raise UserError(
            f"batch size {batch_size}, cache {cache_gib:g} GiB, pool {pool}: expected 1 or more, 0 or more, and one of {', '.join(POOLS)}"
        )
    seed = check_labels(labels, subset_seed)
    data = read_saved_config(run).data
    train, val = open_labelled(data)
    ids = open_subset(run, train, labels=labels, seed=seed, write=processes.is_main_process)
    if len(ids) < least_train:
        raise UserError(
            f"{least_train} labelled training pictures are asked for (--k?), labels {labels} gives {len(ids)}; ask for fewer, or for more labels"
        )
    step, student = read_step(run) if (run / "student.safetensors").is_file() else 0, load_student(run)
    cache = FeatureCache(run, student, gib=cache_gib)
    student.to(processes.device)
    options = {"processes": processes, "pool": pool, "batch_size": batch_size}
    train_features, train_labels = cache.embed(
        student, train, data, subset=None if labels == ALL else ids, title="train features", **options
    )
    val_features, val_labels = cache.embed(student, val, data, title="val features", **options)
    about = {
        "labels": labels,
        "subset_seed": seed,
        "step": step,
        "num_train": len(ids),
        "num_val": val.num_samples,
        "data": train.fingerprint,
        "device": device_name(processes.device),
        "world_size": processes.num_processes,
    }
    return FrozenFeatures(train_features, train_labels, val_features, val_labels, len(train.classes), about)


def settings_of(processes: Processes, *, pool: str) -> dict:
    """The part of a result's settings that both evaluations share."""
    return {"pool": pool, "precision": precision_of(processes)}


def write_result(
    run: Path, about: dict, *, metric: str, top1: float, top5: float | None, settings: dict, since: float
) -> dict:
    """Complete a result, add it to RUN/results.jsonl and return it. since: of time.monotonic(). By one process alone."""
    result = {
        "metric": metric,
        "top1": top1,
        "top5": top5,
        "settings": settings,
        "seconds": round(time.monotonic() - since, 3),
        **about,
    }
    return append_result(run, result)
