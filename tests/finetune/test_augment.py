"""Augmentations are timm's, and their draws depend on their key alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dmae_ds.config.objectives import AugmentConfig
from dmae_ds.data.batch import Batch
from dmae_ds.data.rand_augment import RandAugment
from dmae_ds.data.transforms import AUGMENT_STREAM, sample_rng
from dmae_ds.finetune.augment import Prepare
from dmae_ds.models.patches import Normalize

VIEW = np.random.default_rng(0).integers(0, 256, (3, 24, 24), dtype=np.uint8)


def batch(ids, epoch=0):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids = torch.tensor(ids)
    return Batch(images[ids], None, ids % 4, ids, torch.full_like(ids, epoch))


def prepare(**changes):
    off = {"rand_augment": None, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    return Prepare(AugmentConfig(**{**off, **changes}), normalize, num_classes=4, seed=1)


def test_rand_augment_is_a_function_of_its_key():
    augment = RandAugment("rand-m9-mstd0.5-inc1", img_size=24, mean=(0.5, 0.5, 0.5))
    views = []
    for noise in (1, 2):
        random.seed(noise)
        np.random.seed(noise)
        views.append([augment(VIEW.copy(), sample_rng(0, 0, sample, AUGMENT_STREAM)) for sample in range(12)])
    assert all(np.array_equal(a, b) for a, b in zip(*views, strict=True))
    assert views[0][0].shape == (3, 24, 24) and views[0][0].dtype == np.uint8
    assert sum(not np.array_equal(view, VIEW) for view in views[0]) > 6
    assert len({view.tobytes() for view in views[0]}) > 6
    other = (
        augment(VIEW.copy(), sample_rng(1, 0, 3, AUGMENT_STREAM)),
        augment(VIEW.copy(), sample_rng(0, 1, 3, AUGMENT_STREAM)),
    )
    assert not np.array_equal(other[0], views[0][3]) or not np.array_equal(other[1], views[0][3])


def test_the_strongest_posterisation_gives_black_without_an_error():
    augment = RandAugment("rand-m10-n20-inc1", img_size=24, mean=(0.5, 0.5, 0.5))
    posterize = [op for op in augment.transform.ops if op.name == "PosterizeIncreasing"]
    posterize[0].prob = 1.0
    augment.transform.ops = posterize
    augment.transform.choice_weights = None
    assert not augment(VIEW.copy(), sample_rng(0, 0, 0, AUGMENT_STREAM)).any()


def test_without_augmentation_images_are_normalised_and_labels_unchanged():
    images, labels = prepare()(batch([3, 4, 5]), step=0, piece=0)
    torch.testing.assert_close(images, (batch([3, 4, 5]).images / 255 - 0.5) / 0.25)
    assert labels.tolist() == [3, 0, 1]


def test_erasing_is_keyed_by_sample_in_any_batch():
    erase = prepare(erase=1.0)
    in_one_batch, _ = erase(batch([3, 4, 5, 6]), step=0, piece=0)
    torch.manual_seed(7)
    in_another, _ = erase(batch([6, 3]), step=9, piece=1)
    assert torch.equal(in_another, in_one_batch[[3, 0]])
    clean, _ = prepare()(batch([3, 4, 5, 6]), step=0, piece=0)
    erased = (in_one_batch != clean).all(dim=1)  # [N, H, W]
    assert erased.flatten(1).any(dim=1).all() and 0.02 / 2 < erased.float().mean() < 0.5
    later, _ = erase(batch([3, 4, 5, 6], epoch=1), step=0, piece=0)
    assert not torch.equal(later, in_one_batch)


@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_mixing_is_keyed_by_step_and_piece_and_mixes_labels_like_images(kind):
    mix = prepare(**kind, label_smoothing=0.1)
    outcomes = {
        place: mix(batch([0, 1, 2, 3]), step=place[0], piece=place[1]) for place in ((0, 0), (0, 1), (1, 0))
    }
    again = mix(batch([0, 1, 2, 3]), step=0, piece=1)
    assert torch.equal(again[0], outcomes[0, 1][0]) and torch.equal(again[1], outcomes[0, 1][1])
    assert len({mixed[1].numpy().tobytes() for mixed in outcomes.values()}) == 3
    clean, _ = prepare()(batch([0, 1, 2, 3]), step=0, piece=0)
    images, labels = outcomes[0, 0]
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))
    # Image 0 is mixed with image 3, of class 3, with the share that is in its label.
    share = ((labels[0, 0] - 0.025) / 0.9).item()
    if "mixup" in kind:
        torch.testing.assert_close(images[0], share * clean[0] + (1 - share) * clean[3], rtol=1e-4, atol=1e-5)
    else:
        assert (images[0] == clean[0]).all(dim=0).float().mean().item() == pytest.approx(share, abs=1e-6)
    assert mix.criterion().label_smoothing == 0


def test_labels_are_smoothed_once():
    assert prepare(label_smoothing=0.1).criterion().label_smoothing == 0.1
    _, labels = prepare(label_smoothing=0.1, mixup=0.8)(batch([0, 1]), step=0, piece=0)
    assert labels.min() == pytest.approx(0.025)


def test_dropped_paths_are_keyed_by_step_and_piece():
    draws = []
    for place in ((0, 0), (0, 0), (0, 1), (1, 0)):
        prepare().seed_drop_path(step=place[0], piece=place[1])
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3
