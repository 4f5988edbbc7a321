"""Weighted k-nearest-neighbour top-1 and top-5 on frozen features (Wu et al. 2018, Sec. 3.4).

    dmae-ds eval knn RUN [--k 1 10 20 100] [--labels 10%]

The defaults of k and T are DINO's. The student is not tuned: the number measures its features as they are, in
one pass over the images.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.evaluate.features import Processes, start_processes
from dmae_ds.evaluate.frozen import FrozenFeatures, open_frozen, settings_of
from dmae_ds.evaluate.neighbours import Blocks, choose_blocks, nearest
from dmae_ds.evaluate.results import append_result, make_result
from dmae_ds.evaluate.source import FrozenSource, source_of_run

TOP = 5


def evaluate_run(
    run: Path | FrozenSource,
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
    """Classify data.val by data.train; print a line for each k and add it to RUN/results.jsonl. Collective.

    memory_gib: for the search, in addition to the features; the other options as in `open_frozen`
    Returns the results, on the main process. Raises UserError for a run without labelled data or numbers out
    of range.
    """
    ks = check_vote(ks, temperature)
    source = run if isinstance(run, FrozenSource) else source_of_run(run)
    start, accelerator = time.monotonic(), start_processes(source.run)
    frozen = open_frozen(
        source,
        labels=labels,
        subset_seed=subset_seed,
        pool=pool,
        batch_size=batch_size,
        cache_gib=cache_gib,
        processes=accelerator,
        least_train=ks[-1],
    )
    scores = classify(frozen, ks=ks, temperature=temperature, memory_gib=memory_gib, processes=accelerator)
    settings = {**source.settings(), **settings_of(accelerator, pool=pool)}
    results = []
    for k, (top1, top5) in scores.items() if accelerator.is_main_process else ():
        result = make_result(
            frozen.measured_on,
            metric="knn",
            scores={"top1": top1, "top5": top5},
            settings={"k": k, "temperature": temperature, **settings},
            seconds=round(time.monotonic() - start, 3),
        )
        results.append(append_result(source.results, result))
        second = "" if top5 is None else f", top-5 {top5:.1f}%"
        how = f"k {k}, T {temperature:g}, {pool} pool"
        print(f"knn top-1 {top1:.1f}%{second} ({how}, {frozen.describe(top1)})", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def check_vote(ks: list[int], temperature: float) -> list[int]:
    """The numbers of neighbours, rising and each once. Raises UserError unless all numbers are above 0."""
    if not ks or min(ks) < 1 or not temperature > 0:
        raise UserError(
            f"k {' '.join(map(str, ks))}, temperature {temperature:g}: the numbers must be above 0"
        )
    return sorted(set(ks))


def classify(
    frozen: FrozenFeatures, *, ks: list[int], temperature: float, memory_gib: float, processes: Processes
) -> dict[int, tuple[float, float | None]]:
    """Top-1 and top-5 in percent for each k; top-5 is None with 5 classes or fewer.

    Collective: each process takes a part of the queries. Raises UserError for features that are not finite.
    """
    # The same on every process: each has all features.
    if not (frozen.train.isfinite().all() and frozen.val.isfinite().all()):
        raise UserError("the student's features are not finite; check its training with `dmae-ds report`")
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
    has_top5 = frozen.num_classes > TOP
    return {k: (top1, top5 if has_top5 else None) for k, (top1, top5) in zip(ks, percent, strict=True)}


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
    """Classify each query by a weighted vote of its k most similar training rows, for every k at once.

    A row's weight is exp(cosine / temperature).
    train [N, D], queries [M, D] float32, train_labels [N] int64; blocks: `neighbours.choose_blocks`
    Returns for each k the classes [M, TOP] int64, most votes first, the lowest class first among equal votes;
    -1 where there are no further votes.
    """
    none = torch.empty(0, TOP, dtype=torch.int64, device=train.device)
    predicted: dict[int, list[Tensor]] = {k: [none] for k in ks}
    for cosines, rows in nearest(train, queries, k=max(ks), blocks=blocks):
        # A factor common to all votes of a query changes no order; this one keeps any temperature from over-
        # and underflow.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        classes = train_labels[rows]
        votes = weights.new_zeros(len(rows), max(TOP, num_classes))
        # One neighbour of each query at a time: sums in a fixed order, on a GPU too (scatter_add_ has none
        # there).
        lines = torch.arange(len(rows), device=votes.device)
        for place in range(max(ks)):
            votes[lines, classes[:, place]] += weights[:, place]
            if place + 1 in predicted:
                most, order = votes.sort(dim=1, descending=True, stable=True)
                predicted[place + 1].append(order[:, :TOP].where(most[:, :TOP] > 0, -1))
    return {k: torch.cat(classes) for k, classes in predicted.items()}
