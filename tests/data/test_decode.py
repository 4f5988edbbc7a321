"""dmae_ds/data/decode.py: the same pixels as PIL for every kind of file, and one line for other bytes."""

import io
import struct
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from dmae_ds.data import pixels
from dmae_ds.data.decode import decode, decode_bytes
from dmae_ds.data.pixels import MAX_PIXELS, TooLarge
from dmae_ds.data.reader import CorruptSample, SampleReader
from dmae_ds.data.transforms import CROP_RATIO, crop_box, sample_rng, train_view
from tests.messages import refused


@pytest.fixture(scope="module")
def photos():
    """Two real photographs, 640 x 427."""
    return [Image.fromarray(image) for image in load_sample_images().images]


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_pil(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("quality, subsampling", [(75, 2), (92, 2), (92, 1), (95, 0)])
@pytest.mark.parametrize("stored_at", [427, 256])
def test_views_of_photographs_are_those_of_the_official_recipe(photos, quality, subsampling, stored_at):
    """The mean difference to PIL's bicubic RandomResizedCrop on the same box is below .1 of 255."""
    differences = []
    for number, photo in enumerate(photos * 4):
        photo = tvf.resize(photo, stored_at, tv.InterpolationMode.BICUBIC) if stored_at != 427 else photo
        data = encode(photo, quality=quality, subsampling=subsampling)
        official = Image.open(io.BytesIO(data)).convert("RGB")
        left, top, right, bottom = crop_box(
            sample_rng(0, 0, number, 0),
            width=photo.width,
            height=photo.height,
            scale=(0.2, 1.0),
            ratio=CROP_RATIO,
        )
        official = tvf.resized_crop(
            official, top, left, bottom - top, right - left, [224, 224], tv.InterpolationMode.BICUBIC
        )
        ours = train_view(
            decode_bytes(data), sample_rng(0, 0, number, 0), img_size=224, crop_scale=(0.2, 1.0), flip=False
        )
        differences.append(np.abs(ours.astype(int) - np.asarray(official).transpose(2, 0, 1)))
    assert np.mean(differences) < 0.1
    assert np.max(differences) <= 16


@pytest.mark.parametrize(
    "make",
    [
        lambda photo: encode(photo, progressive=True),
        lambda photo: encode(photo.convert("L")),
        lambda photo: encode(photo, keep_rgb=True),
        lambda photo: encode(photo.convert("CMYK")),
        lambda photo: encode(photo, comment=b"c" * 999, icc_profile=b"p" * 70_000),
        lambda photo: encode(photo) + b"behind the end",
        *(
            lambda photo, mode=mode: encode(photo.convert(mode), "PNG")
            for mode in ("RGB", "L", "P", "RGBA", "1", "LA")
        ),
    ],
)
def test_every_kind_of_file_is_decoded_as_by_pil(photos, make):
    data = make(photos[0].crop((0, 0, 123, 77)))
    ours, theirs = decode_bytes(data), with_pil(data)
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape == (77, 123, 3)
    assert np.abs(ours.astype(int) - theirs).mean() < 0.1


def test_cmyk_is_not_inverted(photos):
    data = encode(photos[0].convert("CMYK"))
    assert np.array_equal(decode_bytes(data), with_pil(data))


def test_images_are_not_rotated_by_their_exif_orientation(photos):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encode(photos[0], exif=exif)
    assert decode_bytes(data).shape == (427, 640, 3)
    assert np.abs(decode_bytes(data).astype(int) - with_pil(data)).max() <= 1


def test_bytes_that_are_not_a_whole_image_are_refused_with_shard_and_key(shard_set, photos):
    sample = SampleReader(shard_set).read(5)
    jpeg, png = encode(photos[0]), encode(photos[0], "PNG")
    for data in (
        b"",
        b"text",
        b"\xff\xd8",
        jpeg[:-2000],
        jpeg[:30],
        png[:-2000],
        png[:20],
        encode(photos[0], "BMP"),
        encode(photos[0], "GIF"),
    ):
        words = ("shard-000000.tar", "000000006", "line 7 of sources.txt")
        with refused(*words, error=CorruptSample) as caught:
            decode(sample._replace(data=data))
        assert " 0x" not in str(caught.value)  # no memory address
        assert (caught.value.sample_id, caught.value.key) == (5, "000000006")


def bomb_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


def bomb_jpeg(width, height):
    data = encode(Image.new("RGB", (8, 8)))
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


@pytest.mark.parametrize(
    "bomb",
    [
        bomb_png(100_000, 100_000),
        bomb_jpeg(65_500, 65_500),
        bomb_png(2**31 - 1, 1),
        bomb_jpeg(65_500, MAX_PIXELS // 65_500 + 1),
    ],
)
def test_bombs_are_refused_by_their_header(bomb):
    with refused("pixels", f"{MAX_PIXELS:,}", error=TooLarge):
        decode_bytes(bomb)


@pytest.mark.parametrize("by", ["simplejpeg", "PIL"])
def test_thousands_of_scans_are_refused(photos, monkeypatch, by):
    if by == "PIL":  # it reads what simplejpeg does not
        monkeypatch.setattr(simplejpeg, "decode_jpeg_header", Mock(side_effect=ValueError))
    data = encode(photos[0].resize((64, 64)), progressive=True)
    decode_bytes(data)
    monkeypatch.setattr(pixels, "COUNT_FROM", 0)
    monkeypatch.setattr(pixels, "MAX_SCANNED_PIXELS", 64 * 64 * 9)  # it has ten scans
    with refused("64x64", "10 scans", error=ValueError):
        decode_bytes(data)
