"""A logistic probe: logistic regression on frozen, standardised features, fitted in about a minute.

    dmae-ds eval probe RUN [--l2 1e-3] [--labels 1%]

(`dmae-ds eval linear` is MAE's linear probe, trained with LARS.) l2 is chosen from GRID on a tenth of the
training images, drawn class by class; then all of them are fitted.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.evaluate.features import Processes, start_processes
from dmae_ds.evaluate.frozen import open_frozen, settings_of
from dmae_ds.evaluate.logistic import ALONE, BLOCK, MAX_ITERATIONS, Alone, Probe, fit_probe
from dmae_ds.evaluate.results import append_result, make_result
from dmae_ds.evaluate.source import FrozenSource, source_of_run

GRID = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)  # strongest first: each fit starts from the one before
HELD_OUT = 0.1
TOP = 5


def evaluate_run(
    run: Path | FrozenSource,
    *,
    l2: float | None = None,
    max_iterations: int = MAX_ITERATIONS,
    pool: str = "mean",
    labels: str = "all",
    subset_seed: int | None = None,
    batch_size: int = 256,
    cache_gib: float = 16.0,
) -> dict | None:
    """Fit data.train and classify data.val; print a line and add it to RUN/results.jsonl. Collective.

    l2: see evaluate/logistic.py; None: the best of GRID; the other options as in `open_frozen`
    Returns the result, on the main process. Raises UserError for a run without labelled data or numbers out
    of range.
    """
    if l2 is not None and not l2 > 0:
        raise UserError(f"l2 {l2:g}: must be above 0")
    if max_iterations < 1:
        raise UserError(f"iterations {max_iterations}: must be above 0")
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
    )
    options = {"num_classes": frozen.num_classes, "max_iterations": max_iterations, "processes": accelerator}
    if l2 is None:
        chosen, before = choose_l2(frozen.train, frozen.train_labels, **options)
    else:
        chosen, before = l2, None
    probe = fit_probe(frozen.train, frozen.train_labels, l2=chosen, start=before, **options)
    result = None
    if accelerator.is_main_process:
        top1, top5 = accuracy(probe, frozen.val, frozen.val_labels)
        result = make_result(
            frozen.measured_on,
            metric="probe",
            scores={"top1": top1, "top5": top5},
            settings={
                "l2": "held-out" if l2 is None else l2,
                **({} if max_iterations == MAX_ITERATIONS else {"max_iterations": max_iterations}),
                **source.settings(),
                **settings_of(accelerator, pool=pool),
            },
            seconds=round(time.monotonic() - start, 3),
        )
        result = append_result(source.results, result)
        if not probe.converged:
            print(
                f"the probe had not converged after {probe.iterations} iterations "
                f"(gradient {probe.gradient:.1e}); raise --max-iterations",
                file=sys.stderr,
            )
        second = "" if top5 is None else f", top-5 {top5:.1f}%"
        origin = "from a tenth held out" if l2 is None else "given"
        settings = f"l2 {chosen:g} {origin}, {pool} pool"
        print(f"probe top-1 {top1:.1f}%{second} ({settings}, {frozen.describe(top1)})", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


def choose_l2(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    max_iterations: int,
    processes: Processes | Alone = ALONE,
) -> tuple[float, Probe]:
    """Choose the l2 of GRID with the highest top-1 on a held-out tenth. Collective.

    Returns the strongest among equals, and its probe. Raises UserError if no class has two labelled images.
    """
    held_out = torch.from_numpy(hold_out(labels.cpu().numpy(), HELD_OUT)).to(labels.device)
    if not held_out.any():
        raise UserError(
            "no class has a second labelled image to hold out, which the choice of l2 requires; "
            "give --l2, for example --l2 0.1"
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
    """Rows [n] bool to hold out, always the same ones.

    A class with n_c rows gives round(share * n_c), at least 1 and never all.
    """
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
