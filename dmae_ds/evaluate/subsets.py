"""Which labelled pictures an evaluation learns from: all, or class-balanced shares and k-shot draws (no torch).

    dmae-ds eval knn RUN --labels 1% --subset-seed 0       # also 10%, 5-shot, ...

Drawn from the index alone; shards stay as they are. Every sample draws one 64-bit number from a counter-based generator that is keyed by (fingerprint of the data, seed);
within its class the smallest numbers are taken. So the draw is the same on every machine and for every evaluation, and
all draws of a seed are nested: 1% inside 10%, 1-shot inside 5-shot. The drawn keys are kept in RUN/subsets.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np

from dmae_ds.config.run import DataConfig
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError
from dmae_ds.output.durable import replacing

ALL = "all"
_SHARE, _SHOTS = re.compile(r"(\d+(?:\.\d+)?)%"), re.compile(r"([1-9]\d*)-shot")


def open_labelled(data: DataConfig) -> tuple[ShardSet, ShardSet]:
    """data.train and data.val, of the same classes. Raises UserError where pictures have no labels or there are none to classify."""
    if data.val is None:
        raise UserError(
            "data.val is null: an evaluation needs labelled pictures that nobody was trained on; give data.val=SHARDS, or write it into the run's config.yaml"
        )
    if data.num_samples is not None:
        raise UserError(
            "data.num_samples streams tars without an index, whose labels can't be counted before; make one with `dmae-shards index`, and leave it out"
        )
    access = Access.of(data)
    sets = (
        ShardSet.open(data.train, label="data.train", access=access),
        ShardSet.open(data.val, label="data.val", access=access),
    )
    for name, shard_set in zip(("data.train", "data.val"), sets, strict=True):
        if len(shard_set.classes) < 2:
            raise UserError(
                f"{name} '{shard_set.folder}' has {len(shard_set.classes)} classes, so there is nothing to tell apart; make the shards from one folder a class"
            )
    if sets[0].classes != sets[1].classes:
        raise UserError(
            f"data.train and data.val number different classes ({len(sets[0].classes)} and {len(sets[1].classes)}); make both from the same class folders"
        )
    return sets


def check_labels(labels: str, seed: int | None) -> int | None:
    """The seed that a draw uses: None for `all`, otherwise the one given, or 0. Raises UserError for words that mean nothing."""
    share, shots = _SHARE.fullmatch(labels), _SHOTS.fullmatch(labels)
    if labels != ALL and not shots and not (share and 0 < float(share[1]) < 100):
        raise UserError(
            f"labels '{labels}': expected all, a share below 100% such as 1% or 10%, or a number a class such as 5-shot"
        )
    if labels == ALL and seed is not None:
        raise UserError(
            f"subset seed {seed} is of no use with labels all: nothing is drawn; choose labels such as 10%, or leave the seed out"
        )
    if seed is not None and seed < 0:
        raise UserError(f"subset seed {seed}: expected a whole number of at least 0")
    return None if labels == ALL else seed or 0


def open_subset(run: Path, shard_set: ShardSet, *, labels: str, seed: int | None, write: bool) -> np.ndarray:
    """Draw a subset and keep its keys in RUN/subsets/<labels>-seed<seed>.txt; `all` draws nothing and keeps nothing.

    write: on one process alone; the others only draw
    Returns the sample ids as `draw_subset` does. Raises UserError where the file of an earlier draw says otherwise.
    """
    seed = check_labels(labels, seed)
    ids = draw_subset(shard_set, labels, seed or 0)
    if not write or labels == ALL:
        return ids
    path, content = (
        run / "subsets" / f"{labels}-seed{seed}.txt",
        _list_keys(shard_set, ids, labels=labels, seed=seed),
    )
    if path.is_file():
        if path.read_bytes() != content:
            raise UserError(
                f"'{path}' holds another draw than labels {labels}, seed {seed} of data.train as it is now; were the shards made again? Move the file away"
            )
        return ids
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        file.write(content)
    return ids


def draw_subset(shard_set: ShardSet, labels: str, seed: int) -> np.ndarray:
    """Sample ids [n] int64, rising, of a class-balanced draw: a function of (fingerprint, labels, seed).

    labels: `all`; `10%`: of a class with n_c samples max(1, round(n_c / 10)), halves up; `5-shot`: 5 of each class
    Classes without a sample give none, unlabelled samples (-1) are never drawn; `all` is every sample.
    Raises UserError where a class has fewer samples than the shots asked for.
    """
    check_labels(labels, None if labels == ALL else seed)
    if labels == ALL:
        return np.arange(shard_set.num_samples)
    by_class = read_labels(shard_set)
    key = hashlib.sha256(f"{shard_set.fingerprint} {seed}".encode()).digest()
    # Raw output: unlike numpy's permutations it is the same in every version.
    draws = np.random.Philox(key=int.from_bytes(key[:16], "little")).random_raw(shard_set.num_samples)
    order = np.lexsort((draws, by_class))  # by class, and in each by draw
    order = order[np.searchsorted(by_class[order], 0) :]  # without -1
    counts = np.bincount(by_class[order], minlength=len(shard_set.classes))
    starts = np.cumsum(counts) - counts
    place = np.arange(len(order)) - np.repeat(starts, counts)  # of each sample in its class's order
    return np.sort(order[place < np.repeat(_take(counts, labels, shard_set), counts)])


def read_labels(shard_set: ShardSet) -> np.ndarray:
    """Every sample's class [num_samples] int64, out of the indexes; -1: unlabelled."""
    return np.concatenate(
        [shard_set.open_index(shard)["label"] for shard in range(len(shard_set.shards))]
    ).astype(np.int64)


def _take(counts: np.ndarray, labels: str, shard_set: ShardSet) -> np.ndarray:
    """How many of each class."""
    if share := _SHARE.fullmatch(labels):
        return np.minimum(counts, np.maximum(1, np.floor(counts * float(share[1]) / 100 + 0.5))).astype(
            np.int64
        )
    shots = int(_SHOTS.fullmatch(labels)[1])
    if (counts < shots).any():
        short = int(np.argmin(counts))
        raise UserError(
            f"labels {labels}: class '{shard_set.classes[short]}' of '{shard_set.folder}' has {counts[short]} samples; ask for at most {counts.min()}-shot"
        )
    return np.full(len(counts), shots)


def _list_keys(shard_set: ShardSet, ids: np.ndarray, *, labels: str, seed: int) -> bytes:
    """The file's content: a line that says what was drawn, then `<tar>/<key>` a line."""
    lines = [
        f"# labels {labels}, seed {seed}: {len(ids)} of {shard_set.num_samples} samples of data with fingerprint {shard_set.fingerprint}"
    ]
    bounds = np.searchsorted(ids, [0, *shard_set.ends])
    for shard, (entry, first, stop) in enumerate(zip(shard_set.shards, bounds, bounds[1:], strict=False)):
        rows = ids[first:stop] - (shard_set.ends[shard] - entry.num_samples)
        lines += (
            [f"{entry.name}/{number:09d}" for number in shard_set.open_index(shard)["number"][rows]]
            if len(rows)
            else []
        )
    return ("\n".join(lines) + "\n").encode()
