"""Images with label maps, boxes and masks, from the shards that `dmae-shards make --masks --coco` writes.

    from dmae_ds.data.dense import open_dense

    scenes = open_dense("shards/scenes/train")
    key, image, label_map, boxes, labels, masks, crowd = scenes[0]

A sample is the whole image, undistorted; `dense_transforms.py` draws what training sees of it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from dmae_ds.data.decode import decode
from dmae_ds.data.dense_members import DenseInfo, decode_masks, read_annotations, read_map
from dmae_ds.data.reader import CorruptSample, Sample, SampleReader
from dmae_ds.data.shard_set import DEFAULT_ACCESS, ShardSet
from dmae_ds.data.shards import ShardError
from dmae_ds.data.storage import Access
from dmae_ds.errors import UserError


class DenseSample(NamedTuple):
    """One image with its map and its M objects; what the set does not have is None."""

    key: str
    image: torch.Tensor  # uint8 [3, H, W]
    label_map: torch.Tensor | None = None  # int64 [H, W]; DenseSet.ignore_index (255) is no class
    boxes: torch.Tensor | None = None  # float32 [M, 4]: x0, y0, x1, y1 in pixels
    labels: torch.Tensor | None = None  # int64 [M], from 0
    masks: torch.Tensor | None = None  # bool [M, H, W]; None also where the set has boxes alone
    crowd: torch.Tensor | None = None  # bool [M]: a group of objects, which is not trained on


class DenseSet:
    """Samples of a dense shard set by their number; each process that reads it opens its own files.

    maps, boxes: whether they are read where the set has them; what is not read costs nothing
    """

    def __init__(self, shard_set: ShardSet, *, maps: bool = True, boxes: bool = True):
        info = shard_set.dense
        wanted = " or ".join(name for name, is_read in (("label maps", maps), ("boxes", boxes)) if is_read)
        has_any = info is not None and ((maps and info.map_classes) or (boxes and info.box_classes))
        if not has_any:
            raise ShardError(
                f"'{shard_set.folder}' has no {wanted}; make it with `dmae-shards make SRC DST --masks DIR` "
                f"for label maps, `--coco FILE` for boxes"
            )
        if not maps:
            info = replace(info, map_classes=None)
        if not boxes:
            info = replace(info, box_classes=None, has_masks=False)
        self.shard_set, self.info = shard_set, info
        self._reader = SampleReader(shard_set)

    def __len__(self) -> int:
        return self.shard_set.num_samples

    def __getitem__(self, number: int) -> DenseSample:
        """Read a sample. Raises CorruptSample for damaged bytes, ShardError where they cannot be read."""
        sample = self._reader.read(range(len(self))[number])
        image = torch.from_numpy(decode(sample)).permute(2, 0, 1).contiguous()
        try:
            return self._add_members(sample, image)
        except ValueError as error:
            if isinstance(error, UserError):  # pycocotools is missing, or the bytes are damaged
                raise
            raise CorruptSample(
                f"{sample.shard}: sample {sample.key} cannot be used: {error}; make the shards again",
                sample_id=sample.sample_id,
                key=sample.key,
                shard=sample.shard,
                reason=str(error),
            ) from None

    def _add_members(self, sample: Sample, image: torch.Tensor) -> DenseSample:
        """The sample with its map and objects. Raises ValueError with a reason."""
        info, members = self.info, self._reader.read_members(sample.sample_id)
        height, width = image.shape[1:]
        label_map = boxes = labels = masks = crowd = None
        if info.map_classes is not None:
            if "seg" not in members:
                raise ValueError("it has no .seg.png")
            label_map = torch.from_numpy(read_map(members["seg"], len(info.map_classes)))
            if label_map.shape != image.shape[1:]:
                found = f"{label_map.shape[1]} x {label_map.shape[0]}"
                raise ValueError(f"its label map has {found} pixels, and its image {width} x {height}")
        if info.box_classes is not None:
            if "ann" not in members:
                raise ValueError("it has no .ann.json")
            found = read_annotations(members["ann"], info, width=width, height=height)
            boxes, labels, crowd = map(torch.from_numpy, (found.boxes, found.labels, found.crowd))
            if info.has_masks:
                masks = torch.from_numpy(decode_masks(found.segmentations, width=width, height=height))
        return DenseSample(sample.key, image, label_map, boxes, labels, masks, crowd)

    @property
    def has_maps(self) -> bool:
        """Whether samples have a label map."""
        return self.info.map_classes is not None

    @property
    def has_boxes(self) -> bool:
        """Whether samples have boxes, labels and crowd."""
        return self.info.box_classes is not None

    @property
    def has_masks(self) -> bool:
        """Whether every box has a mask."""
        return self.info.has_masks

    @property
    def map_classes(self) -> list[str]:
        """Names of the classes of the label maps, by number; empty without maps."""
        return self.info.map_classes or []

    @property
    def box_classes(self) -> list[str]:
        """Names of the classes of the boxes, by number; empty without boxes. They need not be the maps'."""
        return self.info.box_classes or []

    @property
    def classes(self) -> list[str]:
        """Names of the maps' classes, or of the boxes' in a set without maps."""
        return self.map_classes or self.box_classes

    @property
    def ignore_index(self) -> int:
        """Value of a label map where there is no class: 255, or 65535 in a set of more than 255 classes."""
        return self.info.ignore_index

    @property
    def fingerprint(self) -> str:
        """Checksum of the set's content."""
        return self.shard_set.fingerprint

    @cached_property
    def keys(self) -> list[str]:
        """Keys of all samples, as in their tars' names; the same numbers key the random draws."""
        shards = range(len(self.shard_set.shards))
        return [f"{number:09d}" for shard in shards for number in self.shard_set.open_index(shard)["number"]]


def open_dense(
    path: str | Path,
    *,
    label: str = "dense data",
    access: Access = DEFAULT_ACCESS,
    maps: bool = True,
    boxes: bool = True,
) -> DenseSet:
    """Open a dense shard set: a folder, or a URL of one.

    label: the user's name for it, such as 'data.train'; access: how URLs are read
    maps, boxes: whether they are read where the set has them
    Raises ShardError for a folder that cannot be used, or has nothing of that.
    """
    return DenseSet(ShardSet.open(path, label=label, access=access), maps=maps, boxes=boxes)


__all__ = ["DenseInfo", "DenseSample", "DenseSet", "open_dense"]
