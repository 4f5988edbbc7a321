"""Write scikit-learn's handwritten digits as a folder of JPEGs: OUT/{train,val}/<class>/<image>.jpg.

1,797 real 8x8 scans, enlarged to 40x40 RGB; the first 1,400 are for training, the last 397 for validation.

    python launch/digits.py OUT
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

NUM_TRAIN = 1400


def main() -> int:
    """Write the folder, whole or not at all; returns the exit code."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("digits.py: error: expected one word, the folder to write: digits.py OUT", file=sys.stderr)
        return 2
    out = Path(sys.argv[1])
    if out.exists():
        print(f"digits.py: error: OUT '{out}' exists; remove it, or give another", file=sys.stderr)
        return 2
    making = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    digits = load_digits()
    for number, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = making / ("train" if number < NUM_TRAIN else "val") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        gray = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        image = gray.resize((40, 40), Image.Resampling.BICUBIC).convert("RGB")
        image.save(folder / f"{number:04d}.jpg", quality=95)
    making.rename(out)
    print(f"{number + 1} images in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
