"""A finished shard folder, as a reader sees it: manifest and file sizes checked, sample ids -> places. No torch here."""

import bisect
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmae_ds.data.shards import MANIFEST, RECORD, SHARD_NAME, VERSION, Shard, ShardError, compute_fingerprint, index_name


@dataclass(frozen=True)
class ShardSet:
    """A finished shard folder. Sample ids are 0 to num_samples - 1."""

    folder: Path
    classes: list[str]
    seed: int
    shards: list[Shard]
    fingerprint: str
    ends: list[int]  # ends[s]: the number of samples in shards 0 to s

    @classmethod
    def open(cls, folder: str | Path, *, label: str) -> "ShardSet":
        """Check manifest and file sizes (one directory listing, no file but the manifest is opened).

        label: what the user calls this folder, such as 'data.train'
        Raises ShardError, one line, for a folder that cannot be used.
        """
        folder = Path(folder)
        make = f"`dmae-shards make SRC {folder}`"
        try:
            text = (folder / MANIFEST).read_bytes()
            found = {entry.name: entry for entry in os.scandir(folder)}
        except (FileNotFoundError, NotADirectoryError):
            raise ShardError(
                f"{label} '{folder}' is not a shard folder: no {MANIFEST} there; make one with {make}"
            ) from None
        except OSError as error:
            raise ShardError(f"{label} '{folder}' cannot be read: {error.strerror}") from None
        try:
            classes, seed, shards, fingerprint = _parse_manifest(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(
                f"{label} '{folder}': {MANIFEST} is unusable: {error}; make it again with {make}"
            ) from None
        for shard in shards:
            for name in (shard.name, index_name(shard.name)):
                if name not in found:
                    raise ShardError(f"{label} '{folder}': {name} is missing; copy it again or run {make}")
            size = found[shard.name].stat().st_size
            if size != shard.bytes:
                raise ShardError(
                    f"{label} '{folder}': {shard.name} has {size:,} bytes, {MANIFEST} says {shard.bytes:,}; "
                    f"copy it again or run {make}"
                )
        ends = list(itertools.accumulate(shard.num_samples for shard in shards))
        return cls(folder, classes, seed, shards, fingerprint, ends)

    @property
    def num_samples(self) -> int:
        return self.ends[-1]

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Returns (shard number, row in its index)."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample id {sample_id} of {self.num_samples} samples")
        shard = bisect.bisect_right(self.ends, sample_id)
        return shard, sample_id - self.ends[shard] + self.shards[shard].num_samples

    def open_index(self, shard: int) -> np.memmap:
        """The records of one shard, [num_samples] of RECORD. Holds a descriptor for as long as it lives."""
        path = self.folder / index_name(self.shards[shard].name)
        try:
            records = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: the index cannot be read ({error}); copy it again") from None
        expected = (self.shards[shard].num_samples,)
        if records.dtype != RECORD or records.shape != expected:
            raise ShardError(
                f"{path}: found {records.shape} records of {records.dtype}, expected {expected} of {RECORD}; "
                f"copy it again"
            )
        return records


def _parse_manifest(text: bytes) -> tuple[list[str], int, list[Shard], str]:
    """Returns (classes, seed, shards, fingerprint). Raises ValueError that says which part is wrong."""

    def check(good: bool, what: str) -> None:
        if not good:
            raise ValueError(what)

    def is_count(value: object) -> bool:
        return type(value) is int and value >= 0  # type(): a bool is no count

    manifest = json.loads(text)
    check(isinstance(manifest, dict), f"found a {type(manifest).__name__}, expected an object")
    version = manifest.get("version")
    check(version == VERSION, f"found format version {version!r}, expected {VERSION}")
    classes, seed, entries = manifest.get("classes"), manifest.get("seed"), manifest.get("shards")
    check(isinstance(classes, list) and all(isinstance(c, str) for c in classes), "classes is not a list of names")
    check(type(seed) is int, f"seed is {seed!r}, expected an integer")
    check(isinstance(entries, list), "shards is not a list")
    shards = []
    fields = list(Shard.__dataclass_fields__)
    for number, entry in enumerate(entries):
        check(isinstance(entry, dict) and set(entry) == set(fields), f"shard {number} has not the fields {fields}")
        shard = Shard(**entry)
        good = isinstance(shard.name, str) and SHARD_NAME.fullmatch(shard.name) is not None
        check(good, f"shard {number} is named {shard.name!r}, expected shard-NNNNNN.tar")
        good = is_count(shard.num_samples) and is_count(shard.bytes)
        check(good, f"num_samples or bytes of {shard.name} is no count")
        shards.append(shard)
    found, total = manifest.get("num_samples"), sum(shard.num_samples for shard in shards)
    check(total > 0, "it lists no samples")
    check(found == total, f"num_samples is {found!r}, its shards hold {total}")
    fingerprint = compute_fingerprint(classes, shards)
    check(manifest.get("fingerprint") == fingerprint, "it does not match its own fingerprint (was it edited?)")
    return classes, seed, shards, fingerprint
