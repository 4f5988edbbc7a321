"""Box and mask AP by pycocotools (extra `dense`), over the images of all processes.

    AP: the mean over intersection-over-union .5, .55, ... .95, over classes with a box, at most 100
    detections an image; AP50 and AP75: at .5 and .75 alone

pycocotools is imported late. Crowd regions are neither found nor missed, as in COCO.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from dmae_ds.data.dense import DenseSample
from dmae_ds.dense.early import check_pycocotools
from dmae_ds.errors import UserError

# Name of a score -> the row of COCOeval's summary.
_ROWS = {"ap": 0, "ap50": 1, "ap75": 2}
SCORES = [f"{kind}_{name}" for kind in ("box", "mask") for name in _ROWS]
MASK_THRESHOLD = 0.5


class AveragePrecision:
    """Collects the detections of this process's images, and scores those of all processes."""

    def __init__(self, num_classes: int):
        check_pycocotools()
        self.num_classes = num_classes
        self.truths: list[dict] = []
        self.detections: list[dict] = []
        self.images: list[dict] = []

    def add(self, image: int, sample: DenseSample, detected: dict[str, Tensor]) -> None:
        """Add an image, by its number in the whole set, and what torchvision's detector found in it.

        detected: {"boxes" [M, 4], "labels" [M] from 1, "scores" [M], "masks" [M, 1, H, W] from 0 to 1}
        """
        height, width = sample.image.shape[1:]
        self.images.append({"id": image, "height": height, "width": width})
        for box, label, mask, crowd in zip(
            sample.boxes.tolist(), sample.labels.tolist(), sample.masks, sample.crowd.tolist(), strict=True
        ):
            self.truths.append(
                {
                    "image_id": image,
                    "category_id": label,
                    "bbox": _as_xywh(box),
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                    "segmentation": run_lengths(mask),
                }
            )
        for box, label, score, mask in zip(
            detected["boxes"].tolist(),
            detected["labels"].tolist(),
            detected["scores"].tolist(),
            detected["masks"].cpu() > MASK_THRESHOLD,
            strict=True,
        ):
            self.detections.append(
                {
                    "image_id": image,
                    "category_id": label - 1,
                    "bbox": _as_xywh(box),
                    "score": score,
                    "segmentation": run_lengths(mask[0]),
                }
            )

    def scores(self) -> dict[str, float]:
        """{"box_ap", "box_ap50", "box_ap75", "mask_ap", ...} in percent, on every process. Collective.

        Raises UserError where no image has a box that is not a crowd.
        """
        images, truths, detections = (
            gather_object(values) for values in (self.images, self.truths, self.detections)
        )
        if all(truth["iscrowd"] for truth in truths):
            raise UserError(
                f"data.val has {len(images)} images and no box but crowds, so there is no average precision; "
                "give validation shards with boxes"
            )
        # In the order of the images, whatever the number of processes: equal scores keep their order.
        truths, detections = (
            sorted(values, key=lambda one: one["image_id"]) for values in (truths, detections)
        )
        categories = [{"id": number, "name": str(number)} for number in range(self.num_classes)]
        truth = {
            "images": sorted(images, key=lambda one: one["id"]),
            "categories": categories,
            "annotations": [{"id": number, **one} for number, one in enumerate(truths, start=1)],
        }
        return {
            f"{kind}_{name}": 100 * value
            for kind, field in (("box", "bbox"), ("mask", "segmentation"))
            for name, value in evaluate(truth, detections, field).items()
        }


def evaluate(truth: dict, detections: list[dict], field: str) -> dict[str, float]:
    """Run COCOeval on plain dictionaries: {"ap", "ap50", "ap75"} from 0 to 1.

    truth: `images`, `categories`, `annotations` of COCO's format; field: bbox or segmentation
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not detections:  # COCO.loadRes does not take an empty list
        return dict.fromkeys(_ROWS, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        names = ("image_id", "category_id", "score", field)
        found = coco.loadRes([{name: one[name] for name in names} for one in detections])
        judge = COCOeval(coco, found, "bbox" if field == "bbox" else "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: float(judge.stats[row]) for name, row in _ROWS.items()}


def run_lengths(mask: Tensor) -> dict:
    """COCO's compressed run lengths of a mask [H, W]."""
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(mask.to(torch.uint8).cpu().numpy()))


def _as_xywh(box: list[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
