"""dmae_ds/data/pixels.py: transparency is laid on white and 16-bit grey is scaled, for every reader."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from dmae_ds.data.decode import decode_bytes
from dmae_ds.data.pixels import to_rgb

RED, BLUE, WHITE = (200, 0, 0), (0, 0, 250), (255, 255, 255)


def png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def columns(mode, left, right):
    """An image of two columns."""
    image = Image.new(mode, (2, 3), left)
    image.paste(right, (1, 0, 2, 3))
    return image


def palette():
    image = columns("P", 0, 1)
    image.putpalette([*BLUE, *RED] + [0] * 762)
    return image


GREY16 = Image.fromarray(np.array([[2000, 60000]] * 3, dtype=np.uint16))
FORMS = {
    "RGBA": (columns("RGBA", (*BLUE, 0), (*RED, 255)), {}, WHITE, RED),
    "RGBA, half": (columns("RGBA", (0, 0, 0, 128), (*RED, 255)), {}, (127, 127, 127), RED),
    "RGBA, opaque": (columns("RGBA", (*BLUE, 255), (*RED, 255)), {}, BLUE, RED),
    "LA": (columns("LA", (9, 0), (9, 255)), {}, WHITE, (9, 9, 9)),
    "palette, one colour": (palette(), {"transparency": 0}, WHITE, RED),
    "palette, a byte each": (palette(), {"transparency": bytes([0, 255])}, WHITE, RED),
    "RGB, one colour": (columns("RGB", BLUE, RED), {"transparency": BLUE}, WHITE, RED),
    "L, one grey": (columns("L", 7, 8), {"transparency": 7}, WHITE, (8, 8, 8)),
    "bits": (columns("1", 0, 1), {"transparency": 0}, WHITE, WHITE),
    "16-bit grey": (GREY16, {}, (7, 7, 7), (234, 234, 234)),
    "16-bit grey, one grey": (GREY16, {"transparency": 2000}, WHITE, (234, 234, 234)),
    "RGB": (columns("RGB", BLUE, RED), {}, BLUE, RED),
    "L": (columns("L", 7, 8), {}, (7, 7, 7), (8, 8, 8)),
}


@pytest.mark.parametrize("image, options, left, right", FORMS.values(), ids=FORMS)
def test_every_mode_becomes_rgb(image, options, left, right):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode_bytes(png(image, **options))
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 2, 3)
    assert {tuple(pixel) for pixel in pixels[:, 0].tolist()} == {left}
    assert {tuple(pixel) for pixel in pixels[:, 1].tolist()} == {right}


def test_integers_of_older_libraries_are_16_bit_grey():
    image = Image.fromarray(np.array([[0, 65535, 70000, -5]], dtype=np.int32))
    assert image.mode == "I"
    assert np.array(to_rgb(image))[0, :, 0].tolist() == [0, 255, 255, 0]


def test_plain_rgb_is_not_copied():
    image = columns("RGB", BLUE, RED)
    assert to_rgb(image) is image
