"""A linear probe in a minute: logistic regression on frozen, standardised features (`dmae-ds eval linear` is MAE's, with SGD).

    dmae-ds eval probe RUN [--l2 1e-3] [--labels 1%]

l2 is chosen on a tenth of the training pictures, drawn class by class, out of GRID; then all of them are fitted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.evaluate.features import Processes
from dmae_ds.evaluate.frozen import open_frozen, settings_of, write_result
from dmae_ds.evaluate.logistic import BLOCK, Alone, Probe, fit_probe

GRID = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)  # from the strongest: each begins where the one before ended
HELD_OUT = 0.1
TOP = 5


def evaluate_run(
    run: Path,
    *,
    l2: float | None = None,
    max_iterations: int = 500,
    pool: str = "mean",
    labels: str = "all",
    subset_seed: int | None = None,
    batch_size: int = 256,
    cache_gib: float = 16.0,
) -> dict | None:
    """Fit data.train, classify data.val; prints a line and adds it to RUN/results.jsonl. Collective under `accelerate launch`.

    l2: see evaluate/logistic.py; None: the best of GRID; the other options as in `open_frozen`
    Returns, on the main process, the result. Raises UserError for a run without labelled data or numbers that fit nothing.
    """
    if (l2 is not None and not l2 > 0) or max_iterations < 1:
        raise UserError(
            f"l2 {l2:g}, iterations {max_iterations}: the numbers must be above 0"
            if l2 is not None
            else f"iterations {max_iterations}: must be above 0"
        )
    start, accelerator = time.monotonic(), Accelerator()
    frozen = open_frozen(
        run,
        labels=labels,
        subset_seed=subset_seed,
        pool=pool,
        batch_size=batch_size,
        cache_gib=cache_gib,
        processes=accelerator,
    )
    options = {"num_classes": frozen.num_classes, "max_iterations": max_iterations, "processes": accelerator}
    chosen, before = (l2, None) if l2 is not None else choose_l2(frozen.train, frozen.train_labels, **options)
    probe = fit_probe(frozen.train, frozen.train_labels, l2=chosen, start=before, **options)
    result = None
    if accelerator.is_main_process:
        top1, top5 = accuracy(probe, frozen.val, frozen.val_labels)
        settings = {"l2": "held-out" if l2 is None else l2, **settings_of(accelerator, pool=pool)}
        result = write_result(
            run, frozen.about, metric="probe", top1=top1, top5=top5, settings=settings, since=start
        )
        if not probe.converged:
            print(
                f"the probe had not converged after {probe.iterations} iterations (gradient {probe.gradient:.1e}); raise --max-iterations",
                file=sys.stderr,
            )
        few = "" if labels == "all" else f", {labels} of the labels, seed {result['subset_seed']}"
        second = "" if top5 is None else f", top-5 {top5:.1f}%"
        how = "from a tenth held out" if l2 is None else "given"
        print(
            f"probe top-1 {top1:.1f}%{second} (l2 {chosen:g} {how}, {pool} pool, {result['num_train']} train, {result['num_val']} val{few})",
            flush=True,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def choose_l2(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    max_iterations: int,
    processes: Processes | Alone = Alone(),
) -> tuple[float, Probe]:
    """The l2 of GRID with the highest top-1 on a held-out tenth (of equals the strongest), and its probe. Collective.

    Raises UserError where no class has a picture to spare.
    """
    held_out = torch.from_numpy(hold_out(labels.cpu().numpy(), HELD_OUT)).to(labels.device)
    if not held_out.any():
        raise UserError(
            "no class has a second labelled picture to hold out for the choice of l2; give --l2, for example --l2 0.1"
        )
    best, probe = (-1.0, 0.0, None), None
    for l2 in GRID:
        probe = fit_probe(
            features[~held_out],
            labels[~held_out],
            l2=l2,
            num_classes=num_classes,
            max_iterations=max_iterations,
            start=probe,
            processes=processes,
        )
        top1, _ = accuracy(probe, features[held_out], labels[held_out])
        if top1 > best[0]:
            best = (top1, l2, probe)
    return best[1], best[2]


def hold_out(labels: np.ndarray, share: float) -> np.ndarray:
    """Which rows [n] bool to hold out: of a class with n_c rows round(share * n_c), at least 1, never all; always the same ones."""
    draws = np.random.Philox(key=0).random_raw(len(labels))
    order = np.lexsort((draws, labels))
    counts = np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    num = np.minimum(np.maximum(1, np.floor(share * counts + 0.5)), counts - 1)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[order[place < np.repeat(num, counts)]] = True
    return held_out


def accuracy(probe: Probe, features: Tensor, labels: Tensor) -> tuple[float, float | None]:
    """Top-1 and top-5 in percent; top-5 is None with 5 classes or fewer."""
    hits = torch.zeros(2, dtype=torch.int64, device=features.device)
    num_classes = len(probe.bias)
    for rows, classes in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
        right = probe.scores(rows).topk(min(TOP, num_classes), dim=1).indices == classes[:, None]
        hits += torch.stack([right[:, 0].sum(), right.any(dim=1).sum()])
    top1, top5 = (100 * hits.double() / len(features)).tolist()
    return top1, top5 if num_classes > TOP else None
