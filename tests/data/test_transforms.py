"""dmae_ds/data/transforms.py: compared with torchvision on PIL images, which is MAE's published recipe."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as tv
from torchvision.transforms import functional as tvf

from dmae_ds.data.transforms import CROP_RATIO, clamped_crop_box, crop_box, eval_view, sample_rng, train_view

MAE_SCALE = (0.2, 1.0)


def random_image(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_close(ours, theirs):
    """Both are equal up to rounding: torch and PIL round and clip differently between the two directions.

    Noise is the worst case (test_decode.py has photographs).
    """
    difference = np.abs(ours.astype(int) - np.asarray(theirs).transpose(2, 0, 1).astype(int))
    assert ours.dtype == np.uint8 and ours.shape == difference.shape
    assert difference.max() <= 16 and difference.mean() < 0.5


def box_of(rng, image):
    return crop_box(rng, width=image.width, height=image.height, scale=MAE_SCALE, ratio=CROP_RATIO)


@pytest.mark.parametrize("seed", range(8))
def test_train_view_equals_torchvision_on_the_same_box(seed):
    image = random_image(97, 61)
    rng = sample_rng(seed, 0, 0, 0)
    left, top, right, bottom = box_of(rng, image)
    theirs = tvf.resized_crop(
        image, top, left, bottom - top, right - left, [32, 32], tv.InterpolationMode.BICUBIC
    )
    if rng.random() < 0.5:
        theirs = tvf.hflip(theirs)
    assert_close(
        train_view(np.array(image), sample_rng(seed, 0, 0, 0), img_size=32, crop_scale=MAE_SCALE, flip=True),
        theirs,
    )


def test_flip_is_half_of_the_views_and_can_be_off():
    image = np.array(random_image(40, 40))
    flipped = 0
    for seed in range(200):
        views = [
            train_view(image, sample_rng(seed, 0, 0, 0), img_size=8, crop_scale=MAE_SCALE, flip=flip)
            for flip in (False, True)
        ]
        flipped += not np.array_equal(*views)
        assert np.array_equal(views[0], views[1]) or np.array_equal(views[0], views[1][:, :, ::-1])
    assert 70 < flipped < 130


def test_crop_boxes_are_distributed_as_in_torchvision():
    image = random_image(100, 75)
    ours = np.array([box_of(sample_rng(0, 0, i, 0), image) for i in range(4000)])
    torch.manual_seed(0)
    theirs = np.array([tv.RandomResizedCrop.get_params(image, MAE_SCALE, CROP_RATIO) for _ in range(4000)])
    top, left, height, width = theirs.T
    theirs = np.stack([left, top, left + width, top + height], axis=1)
    assert ours.min() >= 0 and ours[:, 2].max() <= 100 and ours[:, 3].max() <= 75
    # means and spreads of a few thousand draws: 5 standard errors are about 2 pixels
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 2
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 2
    log_ratios = [np.log((box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1])) for box in (ours, theirs)]
    assert abs(log_ratios[0].std() - log_ratios[1].std()) < 0.015  # of about 0.16


@pytest.mark.parametrize("width, height", [(100, 10), (10, 100), (50, 50), (101, 100), (1, 1), (7, 1000)])
def test_fallback_crop_equals_torchvision(width, height):
    scale = (4.0, 5.0)  # larger than the image: no try can fit
    top, left, h, w = tv.RandomResizedCrop.get_params(random_image(width, height), scale, CROP_RATIO)
    box = crop_box(sample_rng(0, 0, 0, 0), width=width, height=height, scale=scale, ratio=CROP_RATIO)
    assert box == (left, top, left + w, top + h)


@pytest.mark.parametrize("width, height", [(97, 61), (61, 97), (50, 50), (33, 32), (300, 20)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_eval_view_equals_torchvision(width, height, crop_pct):
    image = random_image(width, height)
    recipe = tv.Compose([tv.Resize(round(32 / crop_pct), tv.InterpolationMode.BICUBIC), tv.CenterCrop(32)])
    assert_close(eval_view(np.array(image), img_size=32, crop_pct=crop_pct), recipe(image))


def test_generators_differ_in_every_part_of_their_key():
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    draws = [sample_rng(*key).random(4).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == 5
    assert draws[0] == sample_rng(0, 0, 0, 0).random(4).tolist()


@pytest.mark.parametrize("width, height", [(97, 61), (10, 300), (1, 1)])
def test_the_clamped_crop_is_one_draw_cut_to_the_image(width, height):
    for seed in range(200):
        rng = sample_rng(seed, 0, 0, 0)
        left, top, right, bottom = clamped_crop_box(
            rng, width=width, height=height, scale=(0.08, 1.0), ratio=CROP_RATIO
        )
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        again = sample_rng(seed, 0, 0, 0)
        area = width * height * again.uniform(0.08, 1.0)
        aspect = np.exp(again.uniform(*np.log(CROP_RATIO)))
        expected = (min(round(np.sqrt(area * aspect)), width), min(round(np.sqrt(area / aspect)), height))
        assert (right - left, bottom - top) == tuple(max(1, side) for side in expected)
    # the crop of a tall image has its whole width: torchvision would have drawn another one
    boxes = [
        clamped_crop_box(sample_rng(seed, 0, 0, 0), width=10, height=300, scale=(0.5, 1.0), ratio=CROP_RATIO)
        for seed in range(20)
    ]
    assert {box[2] - box[0] for box in boxes} == {10}


def test_the_named_crop_is_used():
    image = np.array(random_image(20, 200))
    views = [
        train_view(image, sample_rng(0, 0, 0, 0), img_size=16, crop_scale=(0.9, 1.0), flip=False, crop=crop)
        for crop in ("torchvision", "tensorflow")
    ]
    assert not np.array_equal(*views)
