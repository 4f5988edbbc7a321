"""Pictures in labelled rows: as parts of the page, each picture for itself, and as one picture for a figure."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html import escape

import matplotlib
import numpy as np
from PIL import Image

SMALL = 96  # pixels a side: up to here a picture is kept bit for bit, above it is a photograph


@dataclass(frozen=True)
class Board:
    """Rows of as many pictures each: (label, [[H, W, 3] uint8, ...]); `heads` stand above the columns, where they mean something."""

    rows: list[tuple[str, list[np.ndarray]]]
    heads: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [label for label, _ in self.rows]

    def html(self) -> str:
        """A <div> of pictures that stand side by side on any width."""
        columns = len(self.rows[0][1])
        cells = (
            [f"<span></span>{''.join(f'<b>{escape(head)}</b>' for head in self.heads)}"] if self.heads else []
        )
        for label, pictures in self.rows:
            images = "".join(
                f'<img alt="{escape(label)}, {number}" src="{data_url(picture)}">'
                for number, picture in enumerate(pictures, start=1)
            )
            cells.append(f"<span>{escape(label)}</span>{images}")
        return f'<div class="board" style="--columns:{columns}">{"".join(cells)}</div>'

    def mosaic(self, background: str) -> np.ndarray:
        """[H, W, 3] uint8: all pictures on one, each blown up to the size of the largest, with gaps in `background` (#rrggbb)."""
        side = max(max(picture.shape[:2]) for _, pictures in self.rows for picture in pictures)
        side = max(side, 32)
        step = side + max(1, side // 12)  # a picture and its gap
        mosaic = Image.new("RGB", (step * len(self.rows[0][1]), step * len(self.rows)), background)
        for row, (_, pictures) in enumerate(self.rows):
            for column, picture in enumerate(pictures):
                resized = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
                mosaic.paste(resized, (column * step + (step - side) // 2, row * step + (step - side) // 2))
        return np.asarray(mosaic)


def data_url(picture: np.ndarray) -> str:
    """[H, W, 3] uint8 -> a data: URL, PNG for a small picture and JPEG for a photograph."""
    file = io.BytesIO()
    if max(picture.shape[:2]) <= SMALL:
        Image.fromarray(picture).save(file, "PNG", optimize=True)
        kind = "png"
    else:
        Image.fromarray(picture).save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def heat_picture(shares: np.ndarray) -> np.ndarray:
    """[rows, columns] of values from 0 on -> [rows, columns, 3] uint8 in viridis, the largest brightest."""
    shares = shares / max(float(shares.max()), 1e-12)
    return (255 * matplotlib.colormaps["viridis"](shares)[..., :3]).round().astype(np.uint8)
