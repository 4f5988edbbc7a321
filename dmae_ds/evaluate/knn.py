"""Weighted k-nearest-neighbour top-1 and top-5 on frozen features (Wu et al. 2018, Sec. 3.4; k and T as DINO and Wu have them).

    dmae-ds eval knn RUN [--k 1 10 20 100] [--labels 10%]

The student is never tuned, so the number says what its features are worth as they are, in one pass over the pictures.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.evaluate.features import Processes
from dmae_ds.evaluate.frozen import FrozenFeatures, open_frozen, settings_of, write_result
from dmae_ds.evaluate.neighbours import Blocks, choose_blocks, nearest

TOP = 5


def evaluate_run(
    run: Path,
    *,
    ks: list[int],
    temperature: float = 0.07,
    pool: str = "mean",
    labels: str = "all",
    subset_seed: int | None = None,
    batch_size: int = 256,
    memory_gib: float = 1.0,
    cache_gib: float = 16.0,
) -> list[dict]:
    """Classify data.val by data.train; prints a line for each k and adds it to RUN/results.jsonl. Collective under `accelerate launch`.

    memory_gib: for the search, beyond the features; the other options as in `open_frozen`
    Returns, on the main process, the results. Raises UserError for a run without labelled data or numbers that make no vote.
    """
    ks = check_vote(ks, temperature)
    start, accelerator = time.monotonic(), Accelerator()
    frozen = open_frozen(
        run,
        labels=labels,
        subset_seed=subset_seed,
        pool=pool,
        batch_size=batch_size,
        cache_gib=cache_gib,
        processes=accelerator,
        least_train=ks[-1],
    )
    found = classify(frozen, ks=ks, temperature=temperature, memory_gib=memory_gib, processes=accelerator)
    results = []
    if accelerator.is_main_process:
        for k, (top1, top5) in found.items():
            settings = {"k": k, "temperature": temperature, **settings_of(accelerator, pool=pool)}
            results.append(
                write_result(
                    run, frozen.about, metric="knn", top1=top1, top5=top5, settings=settings, since=start
                )
            )
            few = "" if labels == "all" else f", {labels} of the labels, seed {frozen.about['subset_seed']}"
            second = "" if top5 is None else f", top-5 {top5:.1f}%"
            counts = f"{frozen.about['num_train']} train, {frozen.about['num_val']} val"
            print(
                f"knn top-1 {top1:.1f}%{second} (k {k}, T {temperature:g}, {pool} pool, {counts}{few})",
                flush=True,
            )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def check_vote(ks: list[int], temperature: float) -> list[int]:
    """The numbers of neighbours, rising and each once. Raises UserError for numbers that make no vote."""
    if not ks or min(ks) < 1 or not temperature > 0:
        raise UserError(
            f"k {' '.join(map(str, ks))}, temperature {temperature:g}: the numbers must be above 0"
        )
    return sorted(set(ks))


def classify(
    frozen: FrozenFeatures, *, ks: list[int], temperature: float, memory_gib: float, processes: Processes
) -> dict[int, tuple[float, float | None]]:
    """Top-1 and top-5 in percent for each k; top-5 is None with 5 classes or fewer. Collective: each process takes a part of the queries."""
    if not (
        frozen.train.isfinite().all() and frozen.val.isfinite().all()
    ):  # on every process: the features are whole on each
        raise UserError(
            "the student's features are not finite, so nothing is near anything; was its training broken?"
        )
    part = slice(processes.process_index, None, processes.num_processes)
    queries, expected = frozen.val[part].contiguous(), frozen.val_labels[part]
    blocks = choose_blocks(
        num_queries=len(queries),
        num_train=len(frozen.train),
        dim=queries.shape[1],
        k=ks[-1],
        num_classes=frozen.num_classes,
        memory_gib=memory_gib,
    )
    predicted = knn_predict(
        frozen.train,
        frozen.train_labels,
        queries,
        ks=ks,
        temperature=temperature,
        num_classes=frozen.num_classes,
        blocks=blocks,
    )
    right = torch.stack([predicted[k] == expected[:, None] for k in ks])  # [ks, m, TOP]
    hits = torch.stack([right[:, :, 0].sum(dim=1), right.any(dim=2).sum(dim=1)], dim=1)  # [ks, 2]
    percent = (100 * processes.reduce(hits).double() / len(frozen.val)).tolist()
    return {
        k: (top1, top5 if frozen.num_classes > TOP else None)
        for k, (top1, top5) in zip(ks, percent, strict=True)
    }


def knn_predict(
    train: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    *,
    ks: list[int],
    temperature: float,
    num_classes: int,
    blocks: Blocks,
) -> dict[int, Tensor]:
    """Each query's classes by vote of its k most similar training rows, weighted by exp(cosine / temperature), for every k at once.

    train [N, D], queries [M, D] float32, train_labels [N] int64; blocks: `neighbours.choose_blocks`
    Returns for each k the classes [M, TOP] int64, the most voted first, of equal votes the lowest; -1 where nobody voted for more.
    """
    found: dict[int, list[Tensor]] = {
        k: [torch.empty(0, TOP, dtype=torch.int64, device=train.device)] for k in ks
    }
    for cosines, rows in nearest(train, queries, k=max(ks), blocks=blocks):
        # A factor that all votes of a query share changes nothing: with it, no temperature overflows or empties the urn.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        classes = train_labels[rows]
        votes = weights.new_zeros(len(rows), max(TOP, num_classes))
        # One neighbour of each query at a time: sums in a fixed order, on a GPU too (scatter_add_ has none there).
        lines = torch.arange(len(rows), device=votes.device)
        for place in range(max(ks)):
            votes[lines, classes[:, place]] += weights[:, place]
            if place + 1 in found:
                most, order = votes.sort(dim=1, descending=True, stable=True)
                found[place + 1].append(order[:, :TOP].where(most[:, :TOP] > 0, -1))
    return {k: torch.cat(parts) for k, parts in found.items()}
