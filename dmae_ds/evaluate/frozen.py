"""A run's frozen features with their labels, as k-NN and the probe use them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dmae_ds.distributed.device import device_name
from dmae_ds.errors import UserError
from dmae_ds.evaluate.feature_cache import FeatureCache
from dmae_ds.evaluate.features import (
    POOLS,
    VECTOR_POOLS,
    FeatureOptions,
    Processes,
    precision_of,
)
from dmae_ds.evaluate.results import MeasuredOn, interval_text
from dmae_ds.evaluate.source import FrozenSource
from dmae_ds.evaluate.subsets import ALL, check_labels, open_labelled, open_subset, warn_of_same_images
from dmae_ds.models.numerics import fp32_products


@dataclass(frozen=True)
class FrozenFeatures:
    """Features [n, D] float32 and classes [n] int64 of labelled training images and validation images."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    num_classes: int
    measured_on: MeasuredOn

    def describe(self, top1: float) -> str:
        """The numbers of images, the share of the labels if it is not all, and the 95% interval of top-1."""
        on = self.measured_on
        share = "" if on.labels == ALL else f", {on.labels} of the labels, seed {on.subset_seed}"
        return f"{on.num_train} train, {on.num_val} val{share}; {interval_text(top1, on.num_val)}"


def open_frozen(
    source: FrozenSource,
    *,
    labels: str,
    subset_seed: int | None,
    pool: str,
    batch_size: int,
    cache_gib: float,
    processes: Processes,
    least_train: int = 1,
) -> FrozenFeatures:
    """Read a network and embed its data, or read the features from the folder `features`. Collective.

    labels, subset_seed: which training images are used (evaluate/subsets.py); least_train: how many are
    needed
    cache_gib: limit of RUN/features, 0 for no cache
    Raises UserError for a run without labelled data, and for options out of range.
    """
    check_pool(pool)
    if batch_size < 1 or cache_gib < 0:
        raise UserError(
            f"batch size {batch_size}, cache {cache_gib:g} GiB: expected at least 1 image and at least 0 GiB"
        )
    seed = check_labels(labels, subset_seed)
    data, folder = source.data, source.results
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    train, val = open_labelled(data)
    ids = open_subset(folder, train, labels=labels, seed=seed, write=processes.is_main_process)
    if len(ids) < least_train:
        raise UserError(
            f"{least_train} labelled training images are needed (--k), labels {labels} gives {len(ids)}; "
            "lower --k, or use more labels"
        )
    step, student = source.read_step(), source.load()
    check_pool_of(student, pool)
    cache = FeatureCache(folder, student, source.network, gib=cache_gib)
    student.to(processes.device)
    options = FeatureOptions.of(data, pool=pool, batch_size=batch_size)
    subset = None if labels == ALL else ids
    with fp32_products(processes.device, tf32=source.tf32):
        train_rows = cache.embed(
            student, train, options, processes=processes, title="train features", subset=subset
        )
        val_rows = cache.embed(student, val, options, processes=processes, title="val features")
    for name, (_, row_labels) in (("data.train", train_rows), ("data.val", val_rows)):
        if unlabelled := int((row_labels < 0).sum()):
            raise UserError(
                f"{name}: {unlabelled:,} of {len(row_labels):,} images have no label (-1); give shards of "
                "labelled images alone"
            )
    warn_of_same_images(train, val)
    measured_on = MeasuredOn(
        labels=labels,
        subset_seed=seed,
        step=step,
        num_train=len(ids),
        num_val=val.num_samples,
        data=train.fingerprint,
        val=val.fingerprint,
        device=device_name(processes.device),
        world_size=processes.num_processes,
    )
    return FrozenFeatures(*train_rows, *val_rows, len(train.classes), measured_on)


def check_pool(pool: str) -> None:
    """Raise UserError unless the pool gives one feature per image, as k-NN and the probe require."""
    offered = " or ".join(VECTOR_POOLS)
    if pool not in POOLS:
        raise UserError(f"pool '{pool}' is unknown; choose {offered}")
    if pool not in VECTOR_POOLS:
        raise UserError(
            f"pool {pool} gives one feature per patch; k-NN and the probe require one per image: "
            f"choose {offered}"
        )


def check_pool_of(network: nn.Module, pool: str) -> None:
    """Raise UserError where a network has no CLS token to be pooled."""
    if pool == "cls" and getattr(network, "cls_token", None) is None:
        raise UserError("pool cls requires a network with a CLS token, and this one has none; choose mean")


def settings_of(processes: Processes, *, pool: str) -> dict:
    """The part of a result's settings that k-NN and the probe share."""
    return {"pool": pool, "precision": precision_of(processes)}
