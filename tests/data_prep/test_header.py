"""data_prep/header.py: markers give the same sizes as PIL, and other files are refused with a reason."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from data_prep import header
from data_prep.header import MAX_SHRUNK_PIXELS, find_mode, read_header
from dmae_ds.data import pixels
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
    with refused("100000x100000", "67,108,864", "--resize", error=ValueError):
        read_header(bytes(png), len(png))
    with refused("100000x100000", "178,956,970", error=ValueError):
        read_header(bytes(png), len(png), max_pixels=MAX_SHRUNK_PIXELS)


@pytest.mark.parametrize(
    "side, accepted", [(8191, (True, True)), (8193, (False, True)), (13_378, (False, False))]
)
def test_an_image_is_accepted_where_training_reads_it(side, accepted):
    png = bytearray(encode("PNG", "L"))
    png[16:24] = side.to_bytes(4, "big") * 2
    for max_pixels, is_accepted in zip((None, MAX_SHRUNK_PIXELS), accepted, strict=True):
        if is_accepted:
            assert read_header(bytes(png), len(png), max_pixels=max_pixels) == ("png", side, side)
        else:
            with refused("pixels", error=ValueError):
                read_header(bytes(png), len(png), max_pixels=max_pixels)


def test_scans_are_limited_as_in_training(monkeypatch):
    data = encode("JPEG", progressive=True)
    monkeypatch.setattr(pixels, "COUNT_FROM", 0)
    assert read_header(data + b"\xff\xda" * 99, len(data)) == ("jpg", 31, 17)  # behind the file
    monkeypatch.setattr(pixels, "MAX_SCANNED_PIXELS", 31 * 17 * 9)  # it has ten scans
    with refused("31x17", "10 scans", error=ValueError):
        read_header(data, len(data))


GREY16 = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
FORMS = [
    (Image.new("RGBA", (8, 8)), {}, "alpha"),
    (Image.new("LA", (8, 8)), {}, "alpha"),
    (Image.new("P", (8, 8)), {"transparency": bytes([0, 99])}, "alpha"),
    (Image.new("RGB", (8, 8)), {"transparency": (1, 2, 3), "dpi": (72, 72)}, "alpha"),
    (GREY16, {"transparency": 2000}, "alpha"),
    (GREY16, {}, "grey16"),
    (Image.new("P", (8, 8)), {}, None),
    (Image.new("1", (8, 8)), {"dpi": (72, 72)}, None),
    (Image.new("RGB", (8, 8)), {}, None),
]


@pytest.mark.parametrize("image, options, expected", FORMS)
def test_modes_are_read_from_the_header(image, options, expected):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    data = file.getvalue()
    assert find_mode(data, len(data)) == expected
    assert find_mode(data[:40], 40) in ("alpha", "grey16", None)  # cut: no error


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(60), encode("JPEG", "CMYK")])
def test_other_bytes_have_no_mode(data):
    assert find_mode(data, len(data)) is None


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
