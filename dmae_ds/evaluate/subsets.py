"""Subsets of the labelled images that an evaluation uses: class-balanced shares and k-shot draws (no torch).

    dmae-ds eval knn RUN --labels 1% --subset-seed 0       # also 10%, 5-shot, ...

A draw only reads the index. Every sample gets a 64-bit number from a counter-based generator with the key
(fingerprint of the data, seed), and the samples with the smallest numbers of each class are taken. So a draw
is the same on every machine and for every evaluation, and all draws of a seed are nested: 1% inside 10%,
1-shot inside 5-shot. The drawn keys are kept in RUN/subsets.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import unicodedata
from pathlib import Path

import numpy as np

from dmae_ds.config.data import DataConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.output.durable import replacing
from dmae_ds.output.lines import say

ALL = "all"
_SHARE, _SHOTS = re.compile(r"(\d+(?:\.\d+)?)%"), re.compile(r"([1-9]\d*)-shot")


def open_labelled(data: DataConfig) -> tuple[ShardSet, ShardSet]:
    """Open data.train and data.val, which must have the same classes.

    Raises UserError for shards without labels, or without data.val.
    """
    if data.val is None:
        raise UserError(
            "data.val is null, but an evaluation requires labelled images that were not trained on; "
            "give data.val=SHARDS, or set it in the run's config.yaml"
        )
    if data.num_samples is not None:
        raise UserError(
            "data.num_samples is for tars without an index, but an evaluation requires one for its labels; "
            "make one with `dmae-shards index`, and leave data.num_samples out"
        )
    access = Access.of(data)
    sets = (
        ShardSet.open(data.train, label="data.train", access=access),
        ShardSet.open(data.val, label="data.val", access=access),
    )
    for name, shard_set in zip(("data.train", "data.val"), sets, strict=True):
        if len(shard_set.classes) < 2:
            classes = "1 class" if len(shard_set.classes) == 1 else "0 classes"
            raise UserError(
                f"{name} '{shard_set.folder}' has {classes}, an evaluation requires at least 2; "
                "make the shards from one folder per class"
            )
    if sets[0].classes != sets[1].classes:
        raise UserError(
            f"data.train and data.val have different classes ({len(sets[0].classes)} and "
            f"{len(sets[1].classes)} of them): {first_difference(*(one.classes for one in sets))}; make both "
            f"with the same `--classes FILE`"
        )
    return sets


def warn_of_same_images(train: ShardSet, val: ShardSet) -> None:
    """Print a warning, on rank 0, where the manifests say that data.val has the images of data.train."""
    if train.fingerprint == val.fingerprint and os.environ.get("RANK", "0") == "0":
        say(
            f"WARNING: data.val '{val.folder}' has the images of data.train: the numbers say nothing about "
            "other images; give data.val=SHARDS of images that are not in data.train",
            dated=False,
            always=True,
        )


def first_difference(train: list[str], val: list[str]) -> str:
    """The first label whose class is another one in the two sets, and a class that one of them lacks."""
    pairs = list(itertools.zip_longest(train, val))
    label, (one, other) = next((label, pair) for label, pair in enumerate(pairs) if pair[0] != pair[1])
    forms = {unicodedata.normalize("NFC", name or "") for name in (one, other)}
    show = ascii if len(forms) == 1 else repr  # other bytes for the same letters are shown as escapes
    shown = ["no class" if name is None else show(name) for name in (one, other)]
    text = f"label {label} is {shown[0]} in data.train and {shown[1]} in data.val"
    for here, there, name in ((train, val, "data.val"), (val, train, "data.train")):
        known = set(there)
        missing = next((each for each in here if each not in known), None)
        if missing is not None and len(forms) > 1:
            return f"{text}; {name} has no {missing!r}"
    return text


def check_labels(labels: str, seed: int | None) -> int | None:
    """The seed of a draw: None for `all`, otherwise the given one, or 0.

    Raises UserError for `labels` of another form.
    """
    share, shots = _SHARE.fullmatch(labels), _SHOTS.fullmatch(labels)
    if labels != ALL and not shots and not (share and 0 < float(share[1]) < 100):
        raise UserError(
            f"labels '{labels}': expected all, a share below 100% such as 1% or 10%, "
            "or a number per class such as 5-shot"
        )
    if labels == ALL and seed is not None:
        raise UserError(
            f"subset seed {seed} requires labels that are drawn, such as 10%, but labels is all; "
            "leave the seed out, or choose other labels"
        )
    if seed is not None and seed < 0:
        raise UserError(f"subset seed {seed}: expected a whole number of at least 0")
    return None if labels == ALL else seed or 0


def open_subset(run: Path, shard_set: ShardSet, *, labels: str, seed: int | None, write: bool) -> np.ndarray:
    """Draw a subset and keep its keys in RUN/subsets/<labels>-seed<seed>.txt; `all` writes no file.

    write: true on one process only; the others only draw
    Returns the sample ids, as `draw_subset` does. Raises UserError if the file holds another draw.
    """
    seed = check_labels(labels, seed)
    ids = draw_subset(shard_set, labels, seed or 0)
    if not write or labels == ALL:
        return ids
    path = run / "subsets" / f"{labels}-seed{seed}.txt"
    content = _list_keys(shard_set, ids, labels=labels, seed=seed)
    if path.is_file():
        if path.read_bytes() != content:
            raise UserError(
                f"'{path}' holds another draw than labels {labels}, seed {seed} of data.train as it is now; "
                "move the file away if the shards were made again"
            )
        return ids
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        file.write(content)
    return ids


def draw_subset(shard_set: ShardSet, labels: str, seed: int) -> np.ndarray:
    """Rising sample ids [n] int64 of a class-balanced draw, a function of (fingerprint, labels, seed).

    labels: `10%` draws max(1, round(n_c / 10)) of a class's n_c samples, halves rounded up; `5-shot` draws 5
    of each class; `all` is every sample
    Classes without a sample give none, and unlabelled samples (-1) are never drawn.
    Raises UserError if a class has fewer samples than shots.
    """
    check_labels(labels, None if labels == ALL else seed)
    if labels == ALL:
        return np.arange(shard_set.num_samples)
    by_class = read_labels(shard_set)
    key = hashlib.sha256(f"{shard_set.fingerprint} {seed}".encode()).digest()
    # The raw output is the same in every version of numpy, unlike its permutations.
    draws = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(shard_set.num_samples)
    order = np.lexsort((draws, by_class))  # by class, and within a class by draw
    order = order[np.searchsorted(by_class[order], 0) :]  # without unlabelled samples
    counts = np.bincount(by_class[order], minlength=len(shard_set.classes))
    starts = np.cumsum(counts) - counts
    place = np.arange(len(order)) - np.repeat(starts, counts)  # of each sample within its class
    return np.sort(order[place < np.repeat(_take(counts, labels, shard_set), counts)])


def read_labels(shard_set: ShardSet) -> np.ndarray:
    """Every sample's class [num_samples] int64, from the indexes; -1 for unlabelled samples."""
    return np.concatenate(
        [shard_set.open_index(shard)["label"] for shard in range(len(shard_set.shards))]
    ).astype(np.int64)


def _take(counts: np.ndarray, labels: str, shard_set: ShardSet) -> np.ndarray:
    """Number of samples to draw from each class."""
    if share := _SHARE.fullmatch(labels):
        rounded = np.floor(counts * float(share[1]) / 100 + 0.5)
        return np.minimum(counts, np.maximum(1, rounded)).astype(np.int64)
    shots = int(_SHOTS.fullmatch(labels)[1])
    if (counts < shots).any():
        short = int(np.argmin(counts))
        raise UserError(
            f"labels {labels}: class '{shard_set.classes[short]}' of '{shard_set.folder}' has only "
            f"{counts[short]} samples; choose at most {counts.min()}-shot"
        )
    return np.full(len(counts), shots)


def _list_keys(shard_set: ShardSet, ids: np.ndarray, *, labels: str, seed: int) -> bytes:
    """The file's content: a line that describes the draw, then one line `<tar>/<key>` per sample."""
    drawn = f"{len(ids)} of {shard_set.num_samples} samples of data with fingerprint {shard_set.fingerprint}"
    lines = [f"# labels {labels}, seed {seed}: {drawn}"]
    bounds = np.searchsorted(ids, [0, *shard_set.ends])
    for shard, (entry, first, stop) in enumerate(zip(shard_set.shards, bounds, bounds[1:], strict=False)):
        rows = ids[first:stop] - (shard_set.ends[shard] - entry.num_samples)
        if len(rows):
            numbers = shard_set.open_index(shard)["number"][rows]
            lines += [f"{entry.name}/{number:09d}" for number in numbers]
    return ("\n".join(lines) + "\n").encode()
