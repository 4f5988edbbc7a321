"""Boards: labels and heads of the rows, sizes of a mosaic, formats of the images, colours of a heat map."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dmae_ds.report.boards import MAX_LOSSLESS, Board, to_data_url, to_heat_map


def image(side: int, value: int) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def test_html_has_a_row_for_each_label_and_escapes_it():
    board = Board([("a<b", [image(4, 0), image(4, 9)]), ("second", [image(4, 1), image(4, 2)])], ["x", "y"])
    html = board.html()
    assert board.labels == ["a<b", "second"]
    assert html.count("<img") == 4 and "--columns:2" in html
    assert "<b>x</b><b>y</b>" in html and "<span>a&lt;b</span>" in html and "a<b" not in html


def test_a_mosaic_enlarges_every_image_to_the_largest_one():
    mosaic = Board([("a", [image(48, 10), image(4, 200)])]).mosaic("#0000ff")
    height, width = mosaic.shape[:2]
    assert width == 2 * height and height == 48 + 48 // 12
    assert (mosaic[height // 2, height // 2] == 10).all() and (mosaic[height // 2, -height // 2] == 200).all()
    assert (mosaic == 200).all(axis=2).sum() == 48 * 48
    assert mosaic[0, 0].tolist() == [0, 0, 255]  # the gap


@pytest.mark.parametrize("side, kind", [(MAX_LOSSLESS, "PNG"), (MAX_LOSSLESS + 1, "JPEG")])
def test_a_small_image_is_lossless(side, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    head, _, data = to_data_url(pixels).partition(";base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{kind.lower()}" and decoded.format == kind
    assert (np.asarray(decoded) == pixels).all() == (kind == "PNG")


def test_a_heat_map_is_brightest_where_the_value_is_largest():
    heat = to_heat_map(np.array([[0.0, 0.1], [0.2, 0.4]])).sum(axis=2)
    assert heat[0, 0] < heat[0, 1] < heat[1, 0] < heat[1, 1]
    assert (to_heat_map(np.array([[0.0, 1.0]])) == to_heat_map(np.array([[0.0, 5.0]]))).all()
    assert to_heat_map(np.zeros((2, 2))).shape == (2, 2, 3)
