"""Label maps and annotations among the members of tars, for `index` and `verify`."""

import json
from dataclasses import dataclass, replace

from dmae_ds.data.dense_members import DenseInfo, check_segmentation, read_annotations, read_map
from dmae_ds.data.shards import DENSE_MEMBERS


@dataclass
class MemberFacts:
    """What is known of a sample's map and annotations from their bytes."""

    size: tuple[int, int] | None = None  # width and height of a map
    data: bytes | None = None  # of annotations, which are checked with the image's size
    num_objects: int = 0
    num_masks: int = 0


class DenseMembers:
    """Reader of the members `.seg.png` and `.ann.json` of samples, where a set has them."""

    def __init__(self, info: DenseInfo):
        self.info = info
        self.extensions = [
            DENSE_MEMBERS[name]
            for name, classes in (("seg", info.map_classes), ("ann", info.box_classes))
            if classes is not None
        ]

    def read(self, extension: str, data: bytes) -> MemberFacts:
        """Check the bytes of a member as far as that needs no image. Raises ValueError with a reason."""
        if extension == DENSE_MEMBERS["ann"]:
            return MemberFacts(data=data)
        height, width = read_map(data, len(self.info.map_classes)).shape
        return MemberFacts(size=(width, height))

    def check(self, facts: MemberFacts, *, width: int, height: int) -> None:
        """Check a member with its image. Raises ValueError with a reason."""
        if facts.size is not None and facts.size != (width, height):
            found = " x ".join(map(str, facts.size))
            raise ValueError(f"its label map has {found} pixels, and its image {width} x {height}")
        if facts.data is None:
            return
        info = replace(self.info, has_masks=False)
        read_annotations(facts.data, info, width=width, height=height)
        for number, annotation in enumerate(json.loads(facts.data)["annotations"]):
            facts.num_objects += 1
            if annotation.get("segmentation") is not None:
                where = f"its annotation {number}"
                check_segmentation(annotation["segmentation"], where, width=width, height=height)
                facts.num_masks += 1
        facts.data = None
