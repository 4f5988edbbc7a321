"""Corrupt samples: each is replaced by a fixed rule and logged, and too many of them end the run.

The rule: the replacement of sample i in epoch e is the first readable one of P(i + 1), P(i + 2), ... (modulo
N), P a permutation keyed by (seed, e). It is the same for every number of ranks and workers, so ranks stay in
step. It is cropped and masked with the draws of the sample that it replaces; Batch.sample_ids holds the id of
the replacement.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dmae_ds.data.order import epoch_key, permute
from dmae_ds.data.shards import ShardError
from dmae_ds.output.lines import say

MAX_TRIES = 64  # corrupt replacements in a row; after so many the data set itself is broken


@dataclass(frozen=True)
class Corrupt:
    """A corrupt sample, as one line of RUN/corrupt.jsonl."""

    shard: str
    key: str
    sample_id: int
    reason: str
    epoch: int
    replaced_by: int  # the replacement's sample id; -1: it was left out


def replacements(sample_id: int, *, epoch: int, num_samples: int, seed: int) -> Iterator[int]:
    """Ids that may replace a sample, the preferred one first; none if it is the only sample."""
    key = epoch_key(~seed, np.array(epoch))  # ~: another permutation than that of the order
    for number in range(1, min(MAX_TRIES, num_samples) + 1):
        candidate = int(permute(np.array([(sample_id + number) % num_samples]), num_samples, key)[0])
        if candidate != sample_id:
            yield candidate


class CorruptLog:
    """Log of corrupt samples, one line each, in RUN/corrupt.jsonl: shared by all ranks and kept over resumes.

    path None: counted in this process alone
    """

    def __init__(self, path: Path | None, *, max_corrupt: int):
        self.path, self.max_corrupt = path, max_corrupt
        self._known: set[tuple[str, str]] = set()
        self._end = 0  # bytes of the file that were read

    def add(self, samples: Iterable[Corrupt]) -> None:
        """Log the samples that are not in the log yet, and warn. Raises ShardError above max_corrupt."""
        samples = list(samples)
        if not samples:
            return
        self._catch_up()
        for corrupt in samples:
            is_new = (corrupt.shard, corrupt.key) not in self._known
            self._known.add((corrupt.shard, corrupt.key))
            if is_new:
                self._write(corrupt)
            count = len(self._known)
            what = f"{corrupt.shard}: sample {corrupt.key} is corrupt ({corrupt.reason})"
            if count > self.max_corrupt:
                where = "" if self.path is None else f", all in {self.path}"
                raise ShardError(
                    f"{what}, and data.max_corrupt allows {self.max_corrupt} ({count} so far{where}); "
                    f"fix the shards (`dmae-shards verify` lists what differs), or raise data.max_corrupt"
                )
            if is_new:
                instead = "left out"
                if corrupt.replaced_by >= 0:
                    instead = f"replaced by sample id {corrupt.replaced_by}"
                warning = f"WARNING: {what}, {instead}; {count} of at most {self.max_corrupt}"
                say(warning, dated=False, always=True)

    def _catch_up(self) -> None:
        """Read the lines that other ranks, or the run before a resume, have written since."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._end)
            text = file.read()
        self._end += text.rfind(b"\n") + 1  # another rank is still writing the last, unfinished line
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            try:
                entry = json.loads(line)
                self._known.add((entry["shard"], entry["key"]))
            except (ValueError, KeyError, TypeError):  # an unfinished line of a killed run
                continue

    def _write(self, corrupt: Corrupt) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a line is one append, so lines of several ranks are never mixed
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(asdict(corrupt)).encode() + b"\n")
        finally:
            os.close(descriptor)
