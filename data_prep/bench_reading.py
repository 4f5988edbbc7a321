"""Sections of `dmae-shards bench` on reading and decoding, compared with webdataset and the official recipe.

Every row runs on one core. Reading ends with the undecoded bytes of every sample; our rows check their crc32.
Decoding ends with a 224 px crop: normalised floats in the official recipe, and in the other rows the uint8
that the loader passes on (the device normalises; the recipe's uint8 row shows its share).
"""

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.find import find_images
from data_prep.timing import Row, Section
from dmae_ds.data.decode import decode_bytes
from dmae_ds.data.order import batch_positions, block_spans, sample_ids
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError

NUM_DECODED = 500
BATCH = 4096  # the global batch of the recipes
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def reading(images: Path, scratch: Path) -> Section:
    """Reading of shards from a warm cache, compared with webdataset's streaming."""
    import webdataset

    shard_set = _make(images, scratch / "shards")
    paths = [shard_set.folder / shard.name for shard in shard_set.shards]

    def stream() -> None:
        _use_up(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))

    def floor() -> None:
        buffer = bytearray(2**20)
        for path in paths:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    rows = [
        Row("webdataset, streaming", stream),
        Row("index, exact order", lambda: _read_epoch(shard_set, block=1)),
        Row("index, blocks of 16", lambda: _read_epoch(shard_set, block=16)),
        Row("index, blocks of 64", lambda: _read_epoch(shard_set, block=64)),
        Row("floor: 1 MiB reads", floor),
    ]
    return Section("reading", "samples", shard_set.num_samples, rows)


def decoding(images: Path, scratch: Path) -> Section:
    """Decoding of bytes in memory to a 224 px random resized crop, from originals and from short side 256."""
    import torch
    import torchvision
    from torchvision import transforms

    from dmae_ds.data.transforms import CROP_RATIO, crop_box, sample_rng, train_view

    torch.set_num_threads(1)
    originals = _bytes_of(_make(images, scratch / "shards"))
    resized = _bytes_of(_make(images, scratch / "resized", "--resize", "256", "--quality", "95"))
    from PIL import Image

    crop = transforms.RandomResizedCrop(
        224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
    )
    views = [crop, transforms.RandomHorizontalFlip()]
    recipe = transforms.Compose([*views, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    recipe_uint8 = transforms.Compose([*views, transforms.PILToTensor()])

    def pil(data: bytes, number: int, transform: Callable = recipe) -> object:
        return transform(Image.open(io.BytesIO(data)).convert("RGB"))

    def ours(data: bytes, number: int) -> object:
        return train_view(
            decode_bytes(data), sample_rng(0, 0, number, 0), img_size=224, crop_scale=(0.2, 1.0), flip=True
        )

    def tv(data: bytes, number: int) -> object:
        image = torchvision.io.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=torchvision.io.ImageReadMode.RGB
        )
        rng = sample_rng(0, 0, number, 0)
        left, top, right, bottom = crop_box(
            rng, width=image.shape[2], height=image.shape[1], scale=(0.2, 1.0), ratio=CROP_RATIO
        )
        pixels = image[None, :, top:bottom, left:right].contiguous(memory_format=torch.channels_last)
        view = torch.nn.functional.interpolate(pixels, size=(224, 224), mode="bicubic", antialias=True)[0]
        return view.flip(2) if rng.random() < 0.5 else view

    def row(name: str, way: Callable, files: list[bytes]) -> Row:
        def run() -> None:
            # results are dropped: keeping hundreds of megabytes would be timed, too
            for number, data in enumerate(files):
                way(data, number)

        return Row(name, run)

    rows = [
        row("official recipe (PIL, floats)", pil, originals),
        row("the same, uint8", lambda data, number: pil(data, number, recipe_uint8), originals),
        row("torchvision decoder + our crop", tv, originals),
        row("ours", ours, originals),
        row("at 256: official recipe", pil, resized),
        row("at 256: the same, uint8", lambda data, number: pil(data, number, recipe_uint8), resized),
        row("at 256: torchvision + our crop", tv, resized),
        row("at 256: ours", ours, resized),
    ]
    return Section("decoding to 224 px", "images", len(originals), rows)


def _make(images: Path, dst: Path, *options: str) -> ShardSet:
    """Shards of `images`, made on the first call."""
    if not dst.exists():
        max_skip = str(len(find_images(images)))
        command = [
            sys.executable,
            "-m",
            "data_prep.cli",
            "make",
            images,
            dst,
            "--max-skip",
            max_skip,
            *options,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ShardError(f"bench: shards could not be made: {' '.join(done.stderr.split())[-500:]}")
    return ShardSet.open(dst, label="bench")


def _bytes_of(shard_set: ShardSet) -> list[bytes]:
    """Bytes of the first JPEG files of a set."""
    reader = SampleReader(shard_set)
    files = (reader.read(sample_id).data for sample_id in range(shard_set.num_samples))
    return list(itertools.islice((data for data in files if data[:2] == b"\xff\xd8"), NUM_DECODED))


def _read_epoch(shard_set: ShardSet, *, block: int) -> None:
    """Read one epoch in the order of training, as one worker of one rank."""
    reader = SampleReader(shard_set, block=block)
    order = {"num_samples": shard_set.num_samples, "seed": 0, "block": block}
    for step in range(shard_set.num_samples // BATCH + 1):
        positions = batch_positions(
            step,
            global_batch=BATCH,
            rank=0,
            world_size=1,
            micro_batch=BATCH,
            accumulation_step=0,
            num_samples=shard_set.num_samples,
            block=block,
        )
        positions = positions[positions < shard_set.num_samples]
        if len(positions) == 0:
            break
        epochs, ids = sample_ids(positions, **order)
        spans = [None] * len(ids)
        if reader.reads_ahead:
            spans = block_spans(epochs, ids, **order)
            reader.fetch(spans)
        for sample_id, span in zip(ids.tolist(), spans, strict=True):
            reader.read(sample_id, span=span)


def _use_up(samples: object) -> None:
    count = np.int64(0)
    for sample in samples:
        count += len(sample["__key__"])
