"""Damaged inputs for test_mutations.py: images, tars, indexes and manifests, from a seeded generator."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from dmae_ds.data.dense_members import DenseInfo
from dmae_ds.data.shards import NewSample, Shard, compute_fingerprint, write_manifest, write_shard

NUM_SAMPLES = 12


def make_images() -> list[bytes]:
    """Smooth images as JPEG (plain, progressive, with a comment; one CMYK, one grey) and PNG files."""
    rng = np.random.default_rng(0)
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("JPEG", {"comment": b"c" * 200})]
    modes = {4: "CMYK", 8: "L"}
    files = []
    for number in range(NUM_SAMPLES):
        noise = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image = noise.resize((120, 90), Image.Resampling.BICUBIC).convert(modes.get(number, "RGB"))
        kind, options = kinds[number % 4]
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append(file.getvalue())
    return files


IMAGES = make_images()


def make_folder(folder: Path) -> None:
    """Write a shard folder of two shards."""
    samples = [
        NewSample(number, "png" if number % 4 == 2 else "jpg", data, 120, 90, number % 3)
        for number, data in enumerate(IMAGES)
    ]
    shards = [
        write_shard(folder, f"shard-{shard:06d}.tar", samples[6 * shard : 6 * shard + 6])
        for shard in range(2)
    ]
    write_manifest(folder, classes=["a", "b", "c"], seed=0, shards=shards)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, overwrite, cut, extend, swap or repeat bytes, or write an extreme number."""
    data, size = bytearray(data), len(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 5, 30]))):
        at, kind = int(rng.integers(0, max(1, len(data)))), int(rng.integers(0, 9))
        if not data:
            return bytes(rng.bytes(10))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at] = int(rng.choice([0, 255, 127, 128, 48, 55, 0xD8, 0xDA, 0xC2]))
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 700)))
        elif kind == 4:  # swap two stretches
            length, other = int(rng.integers(1, 600)), int(rng.integers(0, len(data)))
            here, there = data[at : at + length], data[other : other + length]
            data[at : at + length], data[other : other + length] = there, here
        elif kind == 5:
            extreme = int(rng.choice([0, 1, 2**15, 65500, 2**16 - 1, 100_000, 2**31 - 1]))
            packed = struct.pack(str(rng.choice([">H", ">I", "<I", "<Q", ">Q"])), extreme % 2**16)
            data[at : at + len(packed)] = packed
        elif kind == 6:
            data[at : at + int(rng.integers(1, 2000))] = b""
        elif kind == 7:
            data = data + data[at:]
        else:  # a byte of the header
            data[int(rng.integers(0, min(600, len(data))))] = int(rng.integers(0, 256))
        data = data[: 4 * size + 1000]
    return bytes(data)


def mutate_manifest(text: str, rng: np.random.Generator) -> str:
    """Replace one value of a manifest by a hostile one, and mostly correct its fingerprint."""
    manifest = json.loads(text)
    hostile = [None, True, -1, 0, 1.5, 2**63, 10**30, "", "../x", "/etc/passwd", "a" * 300, [], {}]
    hostile += ["pipe:touch ran", "shard-000001.tar"]
    value = hostile[int(rng.integers(0, len(hostile)))]
    shard = manifest["shards"][int(rng.integers(0, 2))]
    key = list(manifest)[int(rng.integers(0, len(manifest)))]
    if rng.random() < 0.6:
        shard[list(shard)[int(rng.integers(0, len(shard)))]] = value
    else:
        manifest[key] = value
    if rng.random() < 0.7:
        try:
            manifest["num_samples"] = sum(entry["num_samples"] for entry in manifest["shards"])
            manifest["fingerprint"] = fingerprint_of(manifest)
        except (TypeError, KeyError, AttributeError):
            pass
    return json.dumps(manifest)


def make_dense_folder(folder: Path) -> None:
    """Write a shard folder of one shard, whose samples have a label map and an annotation each."""
    samples = []
    for number, data in enumerate(IMAGES):
        file = io.BytesIO()
        Image.new("L", (120, 90), number % 3).save(file, "PNG")
        extension = "png" if number % 4 == 2 else "jpg"
        ann = json.dumps({"annotations": [ANNOTATION]}).encode()
        samples.append(NewSample(number, extension, data, 120, 90, -1, None, file.getvalue(), ann))
    shard = write_shard(folder, "shard-000000.tar", samples, dense=True)
    write_manifest(folder, classes=[], seed=0, shards=[shard], dense=INFO.entry())


INFO = DenseInfo(map_classes=["a", "b", "c"], box_classes=["d", "e"], has_masks=True)
ANNOTATION = {"bbox": [5, 6, 40, 30], "label": 1, "segmentation": [[5, 6, 45, 6, 45, 36.5]]}


def mutate_annotations(rng: np.random.Generator) -> bytes:
    """Replace values of two annotations by hostile ones, at any depth; sometimes damage the text, too."""
    lengths = {"size": [90, 120], "counts": [100, 50, 10650]}
    if rng.random() < 0.5:
        lengths["counts"] = "T3b10]:"  # some of COCO's compressed text
    content = {"annotations": [ANNOTATION, ANNOTATION | {"segmentation": lengths}]}
    content = json.loads(json.dumps(content))
    hostile = [None, True, -1, 0, 1.5, 1e308, 10**30, -(2**31), float("nan"), "", "o" * 99, [], {}]
    hostile += [[[0, 0] * 3], [[1e6] * 8], [10800], "0" * 5000, [0] * 10801]
    for _ in range(int(rng.integers(1, 4))):
        place: list | dict = content["annotations"]
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = keys[int(rng.integers(0, len(keys)))]
            if not isinstance(place[key], (list, dict)) or rng.random() < 0.2:
                place[key] = hostile[int(rng.integers(0, len(hostile)))]
                break
            place = place[key]
    data = json.dumps(content).encode()
    return mutate(data, rng) if rng.random() < 0.1 else data


def fingerprint_of(manifest: dict) -> str:
    """The fingerprint that belongs to a manifest's content."""
    shards = [Shard(**entry) for entry in manifest["shards"]]
    return compute_fingerprint(manifest["classes"], shards, manifest.get("dense"))


def bomb(rng: np.random.Generator) -> bytes:
    """Make a small file whose header announces up to 100,000 x 100,000 pixels."""
    width, height = (int(rng.choice([1, 8, 8191, 65500, 100_000])) for _ in range(2))
    file = io.BytesIO()
    if rng.random() < 0.5:
        Image.new("RGB", (16, 16), (9, 99, 199)).save(file, "JPEG", progressive=bool(rng.random() < 0.5))
        data = bytearray(file.getvalue())
        start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        data[start : start + 4] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    else:
        Image.new("RGB", (16, 16)).save(file, "PNG")
        data = bytearray(file.getvalue())
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)
