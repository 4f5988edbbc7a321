"""Training batches from unindexed tars, by tarfile, webdataset's grouping and its shuffle buffer.

A worker reads its share of the tars from beginning to end, pass after pass, each in another order. Members
are only
bytes in memory: a name is never used as a path, and only images and numbers are interpreted. webdataset's own
tar reader
is not used: it takes a damaged header for the end of a tar, without a message.
"""

import hashlib
import itertools
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys

from dmae_ds.data.batch import Batch, BatchRows, Loaded
from dmae_ds.data.batch_spec import BatchSpec
from dmae_ds.data.corrupt import Corrupt, CorruptLog
from dmae_ds.data.decode import WrongChannels, decode_bytes
from dmae_ds.data.reader import MAX_SAMPLE_BYTES
from dmae_ds.data.shards import ShardError, name_format
from dmae_ds.data.storage import LocalFile, RemoteFile
from dmae_ds.data.unindexed import UnindexedShards
from dmae_ds.data.worker import end_with_parent

EXTENSIONS = ("jpg", "jpeg", "png", "npy")
READ_BYTES = 2**22


@dataclass(frozen=True)
class StreamedSample:
    """One decoded sample of a tar."""

    image: np.ndarray  # uint8 [H, W, 3]
    label: int  # -1: none
    sample_id: int  # a hash of tar and key
    epoch: int  # number of the worker's pass over its tars


def stream_batches(
    shards: UnindexedShards,
    spec: BatchSpec,
    *,
    start_step: int,
    stop_step: int,
    num_workers: int,
    pin_memory: bool,
    log: CorruptLog,
) -> Iterator[Batch]:
    """This rank's micro-batches of steps [start_step, stop_step).

    Raises ShardError where there are fewer tars than readers, and where `log` counts too many corrupt
    samples.
    """
    assert spec.subset is None and spec.augment is None and spec.repeat == 1  # they require indexed shards
    num_tars, num_readers = len(shards.tars), spec.world_size * max(1, num_workers)
    if num_tars < num_readers:
        raise ShardError(
            f"{num_tars} tars are too few for {num_readers} readers (ranks x data.num_workers): each needs a "
            f"tar; lower data.num_workers, or run `dmae-shards index`"
        )
    loader = DataLoader(
        StreamedBatches(shards, spec, start_step),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=end_with_parent,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
    for item in itertools.islice(loader, (stop_step - start_step) * spec.accumulation):
        if isinstance(item, ShardError):
            raise item
        log.add(item.corrupt)
        yield item.batch


@dataclass(frozen=True)
class StreamedBatches(IterableDataset):
    """Endless micro-batches of one rank; a ShardError is returned, not raised, and is the last item."""

    shards: UnindexedShards
    spec: BatchSpec
    start_step: int

    def __iter__(self) -> Iterator[Loaded | ShardError]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, num_readers = self.spec.rank * num_workers + worker, self.spec.world_size * num_workers
        corrupt: list[Corrupt] = []
        samples = self._samples(reader, num_readers, corrupt)
        try:
            while True:
                batch = self._batch(list(itertools.islice(samples, self.spec.micro_batch)))
                yield Loaded(batch, corrupt.copy())
                corrupt.clear()
        except ShardError as error:
            yield ShardError(str(error))

    def _samples(self, reader: int, num_readers: int, corrupt: list[Corrupt]) -> Iterator[StreamedSample]:
        """Decoded samples of one reader, pass after pass. Raises ShardError if a whole pass gives none."""
        for number in itertools.count(self.start_step):  # a resumed run draws other orders
            key = f"{self.spec.seed} {number}"
            tars = random.Random(key).sample(self.shards.tars, len(self.shards.tars))
            shuffle = webdataset.shuffle(self.shards.shuffle_buffer, rng=random.Random(f"{key} {reader}"))
            empty = True
            for sample in shuffle(_samples_of(tars[reader::num_readers], number, corrupt)):
                try:
                    image = decode_bytes(sample["data"], self.spec.pixels)
                except WrongChannels as error:
                    raise ShardError(
                        f"{sample['tar']}: sample {sample['key']} is {error}; set "
                        "student.in_chans, data.mean and data.std"
                    ) from None
                except ValueError as error:
                    corrupt.append(
                        Corrupt(sample["tar"], sample["key"], sample["id"], str(error), number, -1)
                    )
                    continue
                empty = False
                yield StreamedSample(image, sample["label"], sample["id"], number)
            if empty:
                last = f" (the last: {corrupt[-1].shard}: {corrupt[-1].reason})" if corrupt else ""
                raise ShardError(
                    f"{tars[reader][1]} and the other tars of its reader contain no readable image{last}"
                )

    def _batch(self, samples: list[StreamedSample]) -> Batch:
        rows = BatchRows(len(samples), self.spec)
        for row, sample in enumerate(samples):
            rows.fill(row, sample.image, epoch=sample.epoch, sample_id=sample.sample_id)
        return rows.batch(
            labels=torch.tensor([sample.label for sample in samples]),
            sample_ids=torch.tensor([sample.sample_id for sample in samples]),
            epochs=torch.tensor([sample.epoch for sample in samples]),
        )


def _samples_of(tars: list, number: int, corrupt: list[Corrupt]) -> Iterator[dict[str, Any]]:
    """Samples with an image, as {tar, key, data, label, id}; a cut or damaged tar adds one corrupt entry."""
    for folder, name, size in tars:
        url = name if folder is None else folder.path(name)
        try:
            with _open(folder, name, size) as file:
                for sample in group_by_keys(_members(file, url, number, corrupt)):
                    images = [sample[extension] for extension in EXTENSIONS if extension in sample]
                    key = sample["__key__"]
                    if not images:
                        if "cls" in sample:
                            reason = "a label without an image next to it; `dmae-shards index` joins them"
                            corrupt.append(Corrupt(url, key, -1, reason, number, -1))
                        continue
                    path = f"{url}/{key}".encode(errors="replace")
                    digest = hashlib.blake2b(path, digest_size=8).digest()
                    yield {
                        "tar": url,
                        "key": key,
                        "data": images[0],
                        "label": _label(sample.get("cls")),
                        "id": int.from_bytes(digest, "little") >> 1,
                    }
        except ShardError:
            raise
        except (tarfile.TarError, ValueError, OSError, EOFError) as error:  # group_by_keys raises ValueError
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            corrupt.append(Corrupt(url, "the rest of the tar", -1, reason, number, -1))


def _members(file: BinaryIO, url: str, number: int, corrupt: list[Corrupt]) -> Iterator[dict[str, Any]]:
    """Members that are images or labels, in the form that webdataset groups by keys."""
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_StrictTarInfo) as tar:
        for member in tar:
            is_used = member.name.lower().endswith((*EXTENSIONS, ".cls"))
            if not member.isreg() or member.issparse():
                if is_used and not member.isdir():
                    kind = f"a link to {member.linkname!r}" if member.linkname else "no plain file"
                    reason = f"{kind}, which streaming cannot follow; `dmae-shards index` does"
                    corrupt.append(Corrupt(url, member.name, -1, reason, number, -1))
                continue
            if member.size > MAX_SAMPLE_BYTES:
                corrupt.append(Corrupt(url, member.name, -1, f"{member.size:,} bytes", number, -1))
                continue
            if is_used:
                yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": url}
            tar.members = []  # tarfile would keep an object for every member
        while piece := tar.fileobj.read(READ_BYTES):
            if piece.strip(b"\0"):
                raise ValueError(
                    "bytes follow the end of the tar; if it is several, `dmae-shards index` reads it"
                )


class _StrictTarInfo(tarfile.TarInfo):
    """Header of a member, where a damaged or missing one is an error; tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.InvalidHeaderError as error:
            raise tarfile.InvalidHeaderError(name_format(buf) or str(error)) from None

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError, tarfile.EmptyHeaderError) as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from None


class _Sequential:
    """A file that is read once from its start, by positional reads."""

    def __init__(self, file: LocalFile | RemoteFile):
        self.file, self.offset, self.buffer = file, 0, memoryview(b"")

    def read(self, size: int) -> bytes:
        if not self.buffer:
            self.buffer = memoryview(self.file.read(self.offset, READ_BYTES))
            self.offset += len(self.buffer)
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return bytes(data)

    def __enter__(self) -> "_Sequential":
        return self

    def __exit__(self, *_: object) -> None:
        self.buffer = memoryview(b"")


def _open(folder: Any, name: str, size: int) -> Any:
    """Open a tar for streaming; without a folder, `name` is a pipe: URL."""
    return webdataset.gopen(name) if folder is None else _Sequential(folder.open(name, size=size))


def _label(text: bytes | None) -> int:
    """Label in a .cls member; -1 if there is none or it is not a number."""
    return -1 if text is None or not text.strip().isdigit() else int(text[:18])
