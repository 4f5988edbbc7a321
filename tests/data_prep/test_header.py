"""data_prep/header.py: markers give the same sizes as PIL, and other files are refused with a reason."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from data_prep import header
from data_prep.header import read_header
from tests.messages import refused


def encode(form, mode="RGB", size=(31, 17), **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(
        0, 256, (size[1], size[0], len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8
    )
    Image.fromarray(pixels.squeeze(), mode if mode != "L" else None).save(file, form, **options)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x010E] = "x" * 3000


MODES = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "RGBA")]


@pytest.mark.parametrize(("form", "mode"), MODES)
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"exif": EXIF}, {"comment": b"c" * 70}, {"quality": 5, "optimize": True}],
)
def test_plain_images_are_read_without_pil(form, mode, options, monkeypatch):
    data = encode(form, mode, **options)
    monkeypatch.setattr(header, "_ask_pil", None)
    assert read_header(bytearray(data) + b"stale bytes", len(data)) == (
        "jpg" if form == "JPEG" else "png",
        31,
        17,
    )


def test_unusual_headers_are_left_to_pil():
    data = encode("JPEG")
    filled = data[:2] + b"\xff" + data[2:]  # a fill byte before a marker is allowed
    assert read_header(filled, len(filled)) == ("jpg", 31, 17)


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a" + bytes(50),
        b"RIFF\x10\0\0\0WEBPVP8 ",
        b"x",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0\0\1",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_other_files_are_refused(data):
    with pytest.raises(ValueError):
        read_header(data, len(data))


def test_the_end_marker_of_a_thumbnail_does_not_count():
    thumbnail = encode("JPEG", size=(8, 8))
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = encode("JPEG")
    whole = data[:2] + segment + data[2:]
    assert read_header(whole, len(whole))[1:] == (31, 17)
    with refused("truncated", error=ValueError):
        read_header(whole, len(whole) - 40)


def test_bombs_are_refused_by_their_header():
    png = bytearray(encode("PNG", "L"))
    png[16:24] = (100_000).to_bytes(4, "big") * 2
    with refused("100000 x 100000", "178,956,970", error=ValueError):
        read_header(bytes(png), len(png))


@pytest.mark.filterwarnings("ignore")  # warnings of PIL about broken EXIF data
def test_mutated_headers_agree_with_pil_or_are_refused():
    rng, plain = random.Random(0), [encode("JPEG", exif=EXIF), encode("JPEG", "L"), encode("PNG")]
    agreed = 0
    for number in range(1500):
        data = bytearray(plain[number % 3])
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        try:
            header_read = read_header(data, len(data))
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
            continue
        try:
            with Image.open(io.BytesIO(data)) as image:
                assert header_read[1:] == image.size
                agreed += 1
        except (OSError, SyntaxError, ValueError, AssertionError) as error:
            assert not isinstance(error, AssertionError), error
    assert agreed > 500
