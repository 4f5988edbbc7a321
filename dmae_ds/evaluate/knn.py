"""Weighted k-nearest-neighbour top-1 on frozen features (Wu et al. 2018, Sec. 3.4; k and T as DINO and Wu have them).

    dmae-ds eval knn RUN

The student is never tuned, so the number says what its features are worth as they are, in one pass over the pictures.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional

from dmae_ds.config.load import read_saved_config
from dmae_ds.config.run import DataConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import replacing
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.evaluate.features import POOLS, extract_features, load_student
from dmae_ds.evaluate.record import KNN_FILE
from dmae_ds.models.patches import Normalize


def evaluate_run(run: Path, *, k: int = 20, temperature: float = 0.07, pool: str = "mean", batch_size: int = 256) -> dict:
    """Classify data.val by data.train; prints one line and writes RUN/knn.json. Collective under `accelerate launch`.

    Returns, on the main process, what the file holds: top1 (percent), k, temperature, pool, num_train, num_val, step.
    Raises UserError for a run without labelled data or numbers that make no vote.
    """
    if k < 1 or temperature <= 0 or batch_size < 1 or pool not in POOLS:
        raise UserError(f"k {k}, temperature {temperature:g}, batch size {batch_size}, pool {pool}: the numbers must be above 0, the pool one of {', '.join(POOLS)}")
    config = read_saved_config(run)
    train, val = _open_labelled(config.data, k=k)
    student = load_student(run)
    with safe_open(run / "student.safetensors", framework="pt") as file:
        step = int((file.metadata() or {}).get("step", 0))
    accelerator = Accelerator()
    student.to(accelerator.device)
    normalize = Normalize(config.data.mean, config.data.std).to(accelerator.device)
    (train_features, train_labels), (val_features, val_labels) = (
        extract_features(
            student, shard_set, accelerator=accelerator, normalize=normalize, crop_pct=config.data.crop_pct, pool=pool,
            batch_size=batch_size, num_workers=config.data.num_workers, title=f"{name} features",
        )
        for name, shard_set in (("train", train), ("val", val))
    )  # fmt: skip
    result = {"k": k, "temperature": temperature, "pool": pool, "num_train": train.num_samples, "num_val": val.num_samples, "step": step}
    if accelerator.is_main_process:
        predicted = knn_predict(train_features, train_labels, val_features, k=k, temperature=temperature, num_classes=len(train.classes))
        result = {"top1": 100 * (predicted == val_labels).double().mean().item(), **result}
        with replacing(run / KNN_FILE) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")
        print(f"knn top-1 {result['top1']:.1f}% (k {k}, T {temperature:g}, {pool} pool, {train.num_samples} train, {val.num_samples} val)", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def knn_predict(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, *, k: int, temperature: float, num_classes: int, block: int = 256
) -> Tensor:
    """Each query's class by vote of its k most similar training rows, weighted by exp(cosine / temperature).

    train_features [N, D], train_labels [N] int64, test_features [M, D]
    block: queries at once, which bounds memory to block * N similarities and block * num_classes votes
    Returns classes [M] int64; of equal votes the lowest class wins.
    """
    train = functional.normalize(train_features.float(), dim=1)
    predictions = []
    for queries in test_features.split(block):
        similarities = functional.normalize(queries.float(), dim=1) @ train.T  # [block, N]
        best, neighbours = similarities.topk(k, dim=1)  # [block, k], the most similar first
        # A factor that all votes of a query share changes nothing: with it, no temperature overflows or empties the urn.
        weights = ((best - best[:, :1]) / temperature).exp()
        classes = train_labels[neighbours]
        votes = weights.new_zeros(len(queries), num_classes)
        # One neighbour of each query at a time: sums in a fixed order, on a GPU too (scatter_add_ has none there).
        rows = torch.arange(len(queries), device=votes.device)
        for place in range(k):
            votes[rows, classes[:, place]] += weights[:, place]
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def _open_labelled(data: DataConfig, *, k: int) -> tuple[ShardSet, ShardSet]:
    if data.val is None:
        raise UserError("data.val is null in the run's config.yaml: k-NN needs labelled pictures to classify; write data.val: SHARDS into it")
    access = Access.of(data)
    sets = ShardSet.open(data.train, label="data.train", access=access), ShardSet.open(data.val, label="data.val", access=access)
    for name, shard_set in zip(("data.train", "data.val"), sets, strict=True):
        if len(shard_set.classes) < 2:
            raise UserError(f"{name} '{shard_set.folder}' has {len(shard_set.classes)} class: unlabelled pictures can't vote; make the shards from one folder a class")
    if sets[0].classes != sets[1].classes:
        raise UserError(f"data.train and data.val number different classes ({len(sets[0].classes)} and {len(sets[1].classes)}); make both from the same class folders")
    if k > sets[0].num_samples:
        raise UserError(f"k {k} is larger than the training set of {sets[0].num_samples} pictures; choose a smaller --k")
    return sets
