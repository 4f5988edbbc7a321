"""dmae_ds/data/dense_transforms.py: image, map, boxes and masks move together, by keyed draws."""

from __future__ import annotations

import pytest
import torch

from dmae_ds.data.dense import DenseSample, open_dense
from dmae_ds.data.dense_transforms import (
    FILL,
    LargeScaleJitter,
    SegmentationView,
    ShortestEdge,
    crop,
    fit_size,
    hflip,
    pad,
    resize,
)

PATCH = 20  # side of the patch, px


def patched(height: int, width: int, top: int, left: int, key: int = 7) -> DenseSample:
    """A black image with one white patch, which is class 1, a box and a mask; and another box and mask."""
    image, label_map = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(height, width).long()
    window = (slice(top, top + PATCH), slice(left, left + PATCH))
    image[(slice(None), *window)] = 255
    label_map[window] = 1
    boxes = torch.tensor([[left, top, left + PATCH, top + PATCH], [0, 0, 3, 3]], dtype=torch.float32)
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[(0, *window)] = True
    masks[1, :3, :3] = True
    labels, crowd = torch.tensor([4, 5]), torch.tensor([False, True])
    return DenseSample(f"{key:09d}", image, label_map, boxes, labels, masks, crowd)


def extent(mask: torch.Tensor) -> list[int]:
    rows, columns = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def check_patch(view: DenseSample) -> bool:
    """Whether the patch is in a view; where it is, image, map, box and mask show it at the same pixels."""
    where = (view.label_map == 1) & (view.label_map != 255)
    found = view.labels == 4
    assert bool(where.any()) == bool(found.any())
    assert len(view.boxes) == len(view.labels) == len(view.masks) == len(view.crowd)
    assert view.image.shape[1:] == view.label_map.shape == view.masks.shape[1:]
    if not where.any():
        return False
    white = view.image.float().mean(0) > 127.5
    inside = view.label_map != 255
    differing = (white & inside) != where
    # antialiasing and rounding: the border of the patch may differ by one pixel
    border = torch.nn.functional.max_pool2d(where[None, None].float(), 3, 1, 1)[0, 0] != (
        -torch.nn.functional.max_pool2d(-where[None, None].float(), 3, 1, 1)[0, 0]
    )
    assert not (differing & ~border).any()
    assert differing.sum() <= 0.2 * where.sum() + 4
    assert torch.equal(view.masks[found][0], where)
    box = view.boxes[found][0]
    assert (box - torch.tensor(extent(where), dtype=torch.float32)).abs().max() <= 1
    return True


VIEWS = {
    "segmentation": SegmentationView(size=48, photometric=False),
    "segmentation, colours": SegmentationView(size=33, scale=(0.9, 1.5)),
    "jitter": LargeScaleJitter(size=64, scale=(0.5, 2.0)),
    "shortest edge": ShortestEdge(short_sides=(40, 57, 96), long_side=100),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_painted_patch_is_found_in_image_map_box_and_mask(name):
    num_found = num_lost = 0
    for epoch in range(10):
        for height, width, top, left in ((61, 83, 5, 40), (90, 47, 66, 27), (40, 40, 10, 10)):
            is_there = check_patch(VIEWS[name](patched(height, width, top, left), epoch=epoch))
            num_found, num_lost = num_found + is_there, num_lost + (not is_there)
    assert num_found > 12
    assert (num_lost == 0) == (name == "shortest edge")


def test_draws_depend_on_seed_epoch_and_key_alone(scenes):
    dense = open_dense(scenes / "train")
    view = SegmentationView(size=48)

    def look(number: int, **changes) -> torch.Tensor:
        seed = changes.pop("seed", 0)
        return SegmentationView(size=48, seed=seed)(dense[number], epoch=changes.get("epoch", 2)).image

    first = [view(dense[number], epoch=2) for number in range(6)]
    torch.manual_seed(123)
    again = [view(dense[number], epoch=2) for number in reversed(range(6))][::-1]
    for one, other in zip(first, again, strict=True):
        for a, b in zip(one[1:], other[1:], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(look(0), look(0, epoch=3)) and not torch.equal(look(0), look(0, seed=1))
    state = torch.get_rng_state()
    view(dense[0], epoch=0)
    assert torch.equal(state, torch.get_rng_state())


def test_views_have_their_sizes_and_padding_is_no_class():
    sample = patched(30, 90, 3, 50)
    view = SegmentationView(size=64, short_side=30, scale=(0.5, 0.5), photometric=False, flip=False)
    seen = view(sample, epoch=0)
    assert seen.image.shape == (3, 64, 64) and (seen.label_map[15:] == 255).all()
    assert (seen.label_map[:15, :45] != 255).all() and (seen.label_map[:, 45:] == 255).all()
    assert [int(value) for value in seen.image[:, -1, -1]] == list(FILL) and not seen.masks[:, 15:].any()
    wide = pad(sample, height=31, width=1, ignore_index=65535)
    assert wide.label_map.shape == (31, 90) and (wide.label_map[30] == 65535).all()
    jitter = LargeScaleJitter(size=50, scale=(1, 1), flip=False)(sample, epoch=0)
    assert jitter.image.shape == (3, 50, 50) and (jitter.label_map[17:] == 255).all()
    edge = ShortestEdge(short_sides=(60,), long_side=100)(sample, epoch=1)
    assert edge.image.shape == (3, 33, 100)
    assert fit_size(3, 1000, 1, 100) == (1, 100) and fit_size(480, 640, 800, 1333) == (800, 1067)


def test_half_of_the_views_are_mirrored():
    view = ShortestEdge(short_sides=(40,), long_side=100)
    sides = [float(view(patched(40, 80, 10, 5, key=key), epoch=0).boxes[0, 0]) for key in range(40)]
    assert set(sides) == {5.0, 55.0} and 10 < sides.count(5.0) < 30
    never = ShortestEdge(short_sides=(40,), long_side=100, flip=False)
    assert all(float(never(patched(40, 80, 10, 5, key=key), epoch=0).boxes[0, 0]) == 5 for key in range(10))


def test_crops_of_one_class_are_drawn_again():
    sample = patched(128, 128, 54, 54)._replace(boxes=None, labels=None, masks=None, crowd=None)

    def shares(limit: float) -> int:
        view = SegmentationView(
            size=32, short_side=128, scale=(1, 1), max_class_share=limit, photometric=False
        )
        maps = [view(sample._replace(key=str(key)), epoch=0).label_map for key in range(60)]
        return sum(bool((label_map == 1).float().mean() > 0.25) for label_map in maps)

    assert shares(0.75) > shares(1.0) + 10


def test_objects_that_vanish_are_dropped_with_masks_and_labels():
    sample = patched(60, 80, 30, 50)
    left = crop(sample, top=0, left=0, height=20, width=20)
    assert left.labels.tolist() == [5] and left.crowd.tolist() == [True] and left.masks.shape == (1, 20, 20)
    cut = crop(sample, top=35, left=45, height=10, width=10)
    assert cut.labels.tolist() == [4] and cut.boxes.tolist() == [[5, 0, 10, 10]]
    none = crop(sample, top=4, left=4, height=10, width=10)
    assert none.boxes.shape == (0, 4) and none.labels.shape == (0,) and none.masks.shape == (0, 10, 10)
    again = hflip(pad(resize(none, height=21, width=9), height=25, width=25, ignore_index=255))
    assert again.boxes.shape == (0, 4) and again.masks.shape == (0, 25, 25)
    grey = resize(sample, height=1, width=1).image.flatten().tolist()
    assert len(set(grey)) == 1 and 15 < grey[0] < 35  # on average 21, and more in the middle
    assert resize(sample, height=2, width=2).labels.tolist() == [4]  # no pixel centre is in the other mask


def test_a_cut_box_encloses_what_is_left_of_its_mask():
    sample = patched(60, 80, 30, 50)
    masks = sample.masks.clone()
    masks[0, 30:40, 60:70] = False  # an L
    cut = crop(sample._replace(masks=masks), top=20, left=62, height=40, width=18)
    assert cut.boxes.tolist() == [[0, 20, 8, 30]]
    alone = crop(sample._replace(masks=None), top=20, left=62, height=40, width=18)
    assert alone.boxes.tolist() == [[0, 10, 8, 30]] and alone.masks is None


def test_sets_with_maps_or_boxes_alone_are_transformed():
    sample = patched(41, 57, 5, 8)
    maps = sample._replace(boxes=None, labels=None, masks=None, crowd=None)
    boxes = sample._replace(label_map=None)
    for view in VIEWS.values():
        for epoch in range(4):
            of_all, of_maps, of_boxes = (view(it, epoch=epoch) for it in (sample, maps, boxes))
            assert torch.equal(of_all.label_map, of_maps.label_map) and of_maps.boxes is None
            assert of_boxes.label_map is None and len(of_boxes.boxes) == len(of_boxes.masks)
            if not isinstance(view, SegmentationView):  # whose crops depend on the map
                assert torch.equal(of_all.boxes, of_boxes.boxes)
