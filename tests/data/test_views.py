"""Several views of an image in one batch: keyed draws, sizes and photometric changes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from dmae_ds.data.batch import Batch
from dmae_ds.data.photometric import GREY, JITTER, PHOTOMETRIC, Photometric
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.transforms import sample_rng
from dmae_ds.data.views import View
from tests.data.batches import train

VIEWS = (View(), View(photometric="dino2"), View(size=12, scale=(0.05, 0.3), photometric="dino_local"))


@pytest.fixture(scope="module")
def shards(digits) -> ShardSet:
    return ShardSet.open(digits / "train", label="data.train")


def batches(shards, *, world_size: int = 1, **changes) -> list[Batch]:
    """The global batches of two steps, each put together from all ranks' micro-batches."""
    settings = {
        "img_size": 32,
        "num_patches": 64,
        "crop_scale": (0.5, 1.0),
        "seed": 3,
        "views": VIEWS,
        **changes,
    }
    ranks = [
        list(train(shards, world_size=world_size, rank=rank, stop_step=2, **settings))
        for rank in range(world_size)
    ]
    return [Batch.join(list(micro_batches)) for micro_batches in zip(*ranks, strict=True)]


def same(ours: Batch, theirs: Batch) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(
            [*ours.views, ours.noise, ours.labels], [*theirs.views, theirs.noise, theirs.labels], strict=True
        )
    )


def test_each_view_has_its_size_and_the_first_does_not_depend_on_the_others(shards):
    (first, _), (plain, _) = batches(shards), batches(shards, views=(View(),))
    assert [tuple(view.shape) for view in first.views] == [(8, 3, 32, 32), (8, 3, 32, 32), (8, 3, 12, 12)]
    assert plain.views == (plain.images,)
    assert torch.equal(first.images, plain.images) and torch.equal(first.noise, plain.noise)
    assert not torch.equal(first.views[1], first.images)


def test_views_do_not_depend_on_ranks_or_workers(shards):
    expected = batches(shards)
    for changes in ({"world_size": 2}, {"num_workers": 2}):
        assert all(same(a, b) for a, b in zip(expected, batches(shards, **changes), strict=True))
    assert not same(expected[0], batches(shards, seed=4)[0])


def test_a_view_of_a_small_scale_shows_less_of_the_image(shards):
    """Pixels of a tiny crop vary less than those of the whole image."""
    whole, crop = (
        batches(shards, views=(View(scale=scale),))[0].images.float() for scale in ((1.0, 1.0), (0.01, 0.02))
    )
    assert crop.flatten(1).std(dim=1).mean() < 0.7 * whole.flatten(1).std(dim=1).mean()


def test_a_copy_has_the_crop_of_its_view_in_other_colours(shards):
    views = (View(photometric="dino2"), View(), View(copy_of=1), View(copy_of=1, photometric="jitter"))
    (batch, _), (apart, _) = batches(shards, views=views), batches(shards, views=views[:2])
    assert torch.equal(batch.views[2], batch.views[1]) and torch.equal(batch.views[1], apart.views[1])
    clean, changed = (batch.views[place].float() for place in (1, 3))
    assert not torch.equal(clean, changed)
    # The digits are grey: a change of brightness and contrast keeps the order of an image's pixels.
    for one, other in zip(clean[:, 0].flatten(1), changed[:, 0].flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1] > 0.9
    repeated = batches(shards, views=(*views[1:2], View(copy_of=0)), repeat=2)[0]
    assert torch.equal(repeated.views[0], repeated.views[1])


def test_colour_jitter_is_torchvision_s(image):
    from torchvision.transforms import functional

    class Fixed:
        def uniform(self, low, high):
            return low + 0.25 * (high - low)

        def permutation(self, num):
            return np.array([2, 0, 1])

    expected = Image.fromarray(image.transpose(1, 2, 0))
    for change in (functional.adjust_saturation, functional.adjust_brightness, functional.adjust_contrast):
        expected = change(expected, 0.8)  # a quarter of the way from .6 to 1.4
    actual = PHOTOMETRIC["jitter"](image, Fixed())
    assert np.array_equal(actual, np.array(expected).transpose(2, 0, 1))


def test_repeated_images_have_different_views(shards):
    batch = batches(shards, repeat=2)[0]
    for view in batch.views:
        assert not torch.equal(view[0], view[1])
    assert batch.sample_ids[0] == batch.sample_ids[1]


def test_a_batch_moves_and_is_cut_with_all_its_views(shards):
    batch = batches(shards)[0]
    assert [len(view) for view in batch.first(3).views] == [3, 3, 3] and same(batch.to("cpu"), batch)


# Photometric changes


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8)


@pytest.mark.parametrize("name", [name for name, change in PHOTOMETRIC.items() if change is not None])
def test_the_change_depends_on_the_key_alone(image, name):
    first, again, other = (PHOTOMETRIC[name](image, sample_rng(0, 0, id, 4)) for id in (5, 5, 6))
    assert first.shape == image.shape and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_global_generators_are_neither_used_nor_advanced(image):
    state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[1].copy()
    PHOTOMETRIC["dino2"](image, sample_rng(0, 0, 0, 4))
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


class Draws:
    """Generator with fixed draws: which of the four changes are made, then numbers at one place of a range.

    at: place in the range, 0 to 1
    """

    def __init__(
        self,
        *,
        jitter: bool = False,
        grey: bool = False,
        blur: bool = False,
        solarize: bool = False,
        at: float = 0.5,
    ):
        self.draws = np.array([0.0 if used else 0.999 for used in (jitter, grey, blur, solarize)])
        self.at = at

    def random(self, num: int) -> np.ndarray:
        return self.draws[:num]

    def uniform(self, low: float, high: float) -> float:
        return low + self.at * (high - low)

    def permutation(self, num: int) -> np.ndarray:
        return np.arange(num)


ALL = Photometric(blur=0.5, solarize=0.5)


def test_solarising_inverts_what_is_bright(image):
    assert np.array_equal(ALL(image, Draws(solarize=True)), np.where(image >= 128, 255 - image, image))
    assert np.array_equal(ALL(image, Draws()), image)


def test_grey_is_the_luma_of_the_image(image):
    grey = ALL(image, Draws(grey=True)).astype(int)
    luma = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    assert (grey[0] == grey[1]).all() and (grey[1] == grey[2]).all() and abs(grey[0] - luma).max() <= 1


def test_brightness_comes_first_and_scales_by_at_most_two_fifths():
    flat = np.full((3, 4, 4), 100, np.uint8)  # no contrast, no colour: brightness is all that changes it
    for at, expected in ((0.0, 60), (1.0, 140)):
        assert (abs(ALL(flat, Draws(jitter=True, at=at)).astype(int) - expected) <= 1).all()


def test_blur_keeps_the_mean_and_reduces_contrast(image):
    sharp = np.array(Image.fromarray(image.transpose(1, 2, 0)))
    blurred = ALL(image, Draws(blur=True, at=1.0))
    assert abs(blurred.mean() - sharp.mean()) < 3 and blurred.std() < 0.4 * image.std()


@pytest.mark.parametrize(
    "name, blur, solarize",
    [
        ("dino1", 1.0, 0.0),
        ("dino2", 0.1, 0.2),
        ("dino_local", 0.5, 0.0),
        ("moco1", 1.0, 0.0),
        ("moco2", 0.1, 0.2),
    ],
)
def test_probabilities_are_the_published_ones(name, blur, solarize):
    assert (PHOTOMETRIC[name].blur, PHOTOMETRIC[name].solarize, JITTER, GREY) == (blur, solarize, 0.8, 0.2)


def test_changes_come_as_often_as_their_probability(image):
    flags = np.array([sample_rng(0, 0, id, 4).random(4) < (0.8, 0.2, 0.1, 0.2) for id in range(2000)])
    assert abs(flags.mean(axis=0) - (0.8, 0.2, 0.1, 0.2)).max() < 0.03
    solarised = Photometric(blur=0.0, solarize=0.2)
    white = np.full((3, 2, 2), 255, np.uint8)  # dark only if it is inverted: brightness leaves at least 153
    dark = [solarised(white, sample_rng(0, 0, id, 4)).mean() < 140 for id in range(400)]
    assert 0.1 < np.mean(dark) < 0.3
