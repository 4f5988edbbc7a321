"""What happens to a sample that cannot be read: replaced by a rule, written down, and too many of them end the run.

The rule: the replacement of sample i in epoch e is the first readable one of P(i + 1), P(i + 2), ... (modulo N), P a
permutation keyed by (seed, e). So it is the same for every number of ranks and workers, and ranks stay in step. It is
cropped and masked with the draws of the sample that it stands for, and Batch.sample_ids names the one that is shown.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dmae_ds.data.order import epoch_key, permute
from dmae_ds.data.shards import ShardError

MAX_TRIES = 64  # replacements that are corrupt themselves; then the data is beyond repair


@dataclass(frozen=True)
class Corrupt:
    """One line of RUN/corrupt.jsonl."""

    shard: str
    key: str
    sample_id: int
    reason: str
    epoch: int
    replaced_by: int


def replacements(sample_id: int, *, epoch: int, num_samples: int, seed: int) -> Iterator[int]:
    """The ids that may stand for a sample, the preferred one first: none if it is the only one."""
    key = epoch_key(~seed, np.array(epoch))  # ~: not the order's own permutation
    for number in range(1, min(MAX_TRIES + 1, num_samples)):
        candidate = int(permute(np.array([(sample_id + number) % num_samples]), num_samples, key)[0])
        if candidate != sample_id:
            yield candidate


class CorruptLog:
    """RUN/corrupt.jsonl, shared by all ranks and kept over resumes: one line for each corrupt sample, whoever met it.

    path None: counted in this process alone
    """

    def __init__(self, path: Path | None, *, max_corrupt: int):
        self.path, self.max_corrupt = path, max_corrupt
        self._known: set[tuple[str, str]] = set()
        self._end = 0  # of what was read of the file

    def add(self, found: Iterable[Corrupt]) -> None:
        """Write down those that nobody has met before. Raises ShardError, one line, above max_corrupt."""
        found = list(found)
        if not found:
            return
        self._catch_up()
        for corrupt in found:
            is_new = (corrupt.shard, corrupt.key) not in self._known
            self._known.add((corrupt.shard, corrupt.key))
            if is_new:
                self._write(corrupt)
            count = len(self._known)
            if count > self.max_corrupt:
                where = "" if self.path is None else f", all in {self.path}"
                raise ShardError(
                    f"{corrupt.shard}: sample {corrupt.key} is corrupt ({corrupt.reason}), and data.max_corrupt allows "
                    f"{self.max_corrupt} ({count} so far{where}); mend the shards (`dmae-shards verify` names what differs), or raise it"
                )
            if is_new:
                instead = (
                    f"sample id {corrupt.replaced_by} stands for it"
                    if corrupt.replaced_by >= 0
                    else "it is left out"
                )
                print(
                    f"WARNING: {corrupt.shard}: sample {corrupt.key} is corrupt ({corrupt.reason}), {instead}; {count} of at most {self.max_corrupt}",
                    file=sys.stderr,
                    flush=True,
                )

    def _catch_up(self) -> None:
        """Read what other ranks, and the run before a resume, have written since."""
        if self.path is None or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self._end)
            text = file.read()
        self._end += text.rfind(b"\n") + 1  # half a line is another rank's, still under way
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            try:
                entry = json.loads(line)
                self._known.add((entry["shard"], entry["key"]))
            except (ValueError, KeyError, TypeError):  # the half line of a killed run
                continue

    def _write(self, corrupt: Corrupt) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
        )  # a line is one append: never mixed
        try:
            os.write(descriptor, json.dumps(asdict(corrupt)).encode() + b"\n")
        finally:
            os.close(descriptor)
