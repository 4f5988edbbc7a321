"""Boards of images in labelled rows, as HTML for the page and as one large image for a figure."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html import escape

import matplotlib
import numpy as np
from PIL import Image

MAX_LOSSLESS = 96  # pixels a side; a larger image is stored as JPEG
MIN_SIDE = 32  # pixels a side of an image in a mosaic


@dataclass(frozen=True)
class Board:
    """Rows of equally many images: (label, [[H, W, 3] uint8, ...]). heads: one for each column, or none."""

    rows: list[tuple[str, list[np.ndarray]]]
    heads: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [label for label, _ in self.rows]

    def html(self) -> str:
        """A <div> whose images are side by side at any width."""
        num_columns = len(self.rows[0][1])
        cells = []
        if self.heads:
            heads = "".join(f"<b>{escape(head)}</b>" for head in self.heads)
            cells.append(f"<span></span>{heads}")
        for label, images in self.rows:
            tags = "".join(
                f'<img alt="{escape(label)}, {number}" src="{to_data_url(image)}">'
                for number, image in enumerate(images, start=1)
            )
            cells.append(f"<span>{escape(label)}</span>{tags}")
        return f'<div class="board" style="--columns:{num_columns}">{"".join(cells)}</div>'

    def mosaic(self, background: str) -> np.ndarray:
        """All images as one, [H, W, 3] uint8, each enlarged to the largest one's size.

        background: colour of the gaps, #rrggbb
        """
        largest = max(max(image.shape[:2]) for _, images in self.rows for image in images)
        side = max(largest, MIN_SIDE)
        step = side + max(1, side // 12)  # an image and its gap
        mosaic = Image.new("RGB", (step * len(self.rows[0][1]), step * len(self.rows)), background)
        for row, (_, images) in enumerate(self.rows):
            for column, image in enumerate(images):
                resized = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
                mosaic.paste(resized, (column * step + (step - side) // 2, row * step + (step - side) // 2))
        return np.asarray(mosaic)


def to_data_url(image: np.ndarray) -> str:
    """Encode [H, W, 3] uint8 as a data: URL, a small image as PNG and a large one as JPEG."""
    file = io.BytesIO()
    if max(image.shape[:2]) <= MAX_LOSSLESS:
        Image.fromarray(image).save(file, "PNG", optimize=True)
        kind = "png"
    else:
        Image.fromarray(image).save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def to_heat_map(values: np.ndarray) -> np.ndarray:
    """Values >= 0, [rows, columns], as [rows, columns, 3] uint8 in viridis, the largest value brightest."""
    values = values / max(float(values.max()), 1e-12)
    return (255 * matplotlib.colormaps["viridis"](values)[..., :3]).round().astype(np.uint8)
