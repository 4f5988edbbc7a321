"""An image folder as they are: capital suffixes, hidden files, other files, a PNG named .jpg."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def src(tmp_path):
    """12 images in 3 classes, one of them empty, and 5 other entries."""
    folder = tmp_path / "src"
    rng = np.random.default_rng(0)
    names = [f"bee/{n}.jpg" for n in range(6)] + [f"ant/{n}.JPEG" for n in range(4)]
    names += ["ant/x.png", "ant/really-a-png.jpg"]
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
        image.save(path, "PNG" if "png" in name else "JPEG")
    (folder / "cat" / "folder.jpg").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("readme.txt", "bee/.hidden.jpg", "bee/notes.txt"):
        (folder / name).write_text("no image")
    return folder
