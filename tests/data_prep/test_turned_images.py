"""`make --masks --coco` of images that EXIF turns: data_prep/annotations.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dmae_ds.data.shards import ShardError
from tests.data_prep.dense_sources import annotation, coco_content, make_dense, save
from tests.messages import refused


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("drawn, resize", [("stored", None), ("upright", None), ("stored", 12)])
def test_maps_and_boxes_follow_an_image_that_exif_turns(tmp_path, orientation, drawn, resize):
    """Whether they were drawn before or after: the bright corner is where map, box and mask say."""
    stored = np.zeros((24, 36, 3), np.uint8)
    stored[:12, :8] = 255
    upright = upright_of(Image.fromarray(stored), orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(Image.fromarray(stored), tmp_path / "src" / "a.jpg", exif=exif, quality=95)
    seen = stored if drawn == "stored" else np.asarray(upright)
    values = (seen[:, :, 0] > 0).astype(np.uint8)
    save(Image.fromarray(values), tmp_path / "maps" / "a.png")
    rows, columns = np.flatnonzero(values.any(1)), np.flatnonzero(values.any(0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
    height, width = values.shape
    runs = np.diff([0, *np.flatnonzero(np.diff(np.r_[0, values.T.reshape(-1)])), values.size]).tolist()
    run_lengths = {"size": [height, width], "counts": runs}
    content = coco_content() | {
        "images": [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}],
        "annotations": [annotation(1, 1, box), annotation(2, 1, box, segmentation=run_lengths)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    options = {"coco": tmp_path / "coco.json", "masks": tmp_path / "maps", "num_classes": 2, "resize": resize}
    if orientation < 5:  # sizes do not tell what the map was drawn on
        with refused(f"orientation {orientation}", "--exif", error=ShardError):
            make_dense(tmp_path / "src", tmp_path / "unclear", **options)
        options["exif"] = drawn
    sample = make_dense(tmp_path / "src", tmp_path / "dst", **options)[0]
    bright = sample.image.float().mean(0) > 127
    assert torch.equal(sample.label_map == 1, bright) and bright.sum() == bright.numel() / 9
    assert torch.equal(sample.masks, bright[None].expand(2, -1, -1))
    rows, columns = torch.nonzero(bright, as_tuple=True)
    extent = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
    assert sample.boxes.tolist() == [extent, extent]
    is_stored_upright = drawn == "upright" or resize is not None
    shown = np.asarray(upright) if is_stored_upright else stored
    assert (sample.image.shape[2] > sample.image.shape[1]) == (shown.shape[1] > shown.shape[0])


def upright_of(image: Image.Image, orientation: int) -> Image.Image:
    """The image as a viewer shows it."""
    names = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE")
    names += ("ROTATE_270", "TRANSVERSE", "ROTATE_90")
    return image.transpose(Image.Transpose[names[orientation - 2]])
