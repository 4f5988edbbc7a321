"""Masked and reconstructed images: visible patches are the original's, the others come from the decoder."""

import pytest
import torch

from dmae_ds.config.load import read_saved_config
from dmae_ds.data.batch import Batch
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.evaluate.reconstruct import GREY, choose_images, reconstruct
from dmae_ds.models.masking import keep_random
from dmae_ds.models.patches import Normalize, patchify
from dmae_ds.objectives.build import build_objective
from dmae_ds.objectives.mae import normalize_patches
from tests.evaluate.conftest import make_run

CHOICE = {"num": 5, "seed": 0, "img_size": 16, "num_patches": 16, "crop_pct": 0.875}


@pytest.fixture
def val(shards):
    return ShardSet.open(shards[1], label="data.val")


def test_the_choice_depends_on_the_seed(val):
    images, noise = choose_images(val, **CHOICE)
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8 and noise.shape == (5, 16)
    again = choose_images(val, **CHOICE)
    assert torch.equal(images, again[0]) and torch.equal(noise, again[1])
    other = choose_images(val, **{**CHOICE, "seed": 1})
    assert not torch.equal(images, other[0])
    assert len(choose_images(val, **{**CHOICE, "num": 99})[0]) == 11
    assert len({tuple(row.flatten().tolist()) for row in images}) == 5


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_decoder_gives_the_original(tmp_path, shards, val, norm_pix, monkeypatch):
    config = read_saved_config(make_run(tmp_path / "run", train=shards[0], val=shards[1], norm_pix=norm_pix))
    objective, _ = build_objective(config)
    images, noise = choose_images(val, **CHOICE)
    normalize = Normalize(config.data.mean, config.data.std)
    target = objective.prepare(Batch(images, noise), normalize).masked
    monkeypatch.setattr(
        objective.decoder,
        "forward",
        lambda latent, ids_keep, ids_masked: normalize_patches(target) if norm_pix else target,
    )
    masked, reconstructed = reconstruct(objective, images, noise, normalize)
    assert torch.equal(reconstructed, images)
    assert not torch.equal(masked, images)


def test_visible_patches_are_the_originals_and_masked_ones_are_not(run, val):
    config = read_saved_config(run)
    objective, _ = build_objective(config)
    images, noise = choose_images(val, **CHOICE)
    masked, reconstructed = reconstruct(
        objective, images, noise, Normalize(config.data.mean, config.data.std)
    )
    original, masked, reconstructed = (patchify(some, 4) for some in (images, masked, reconstructed))
    ids_keep, ids_masked = keep_random(noise, 4)
    assert masked.dtype == reconstructed.dtype == torch.uint8
    for image, (keep, hidden) in enumerate(zip(ids_keep, ids_masked, strict=True)):
        assert torch.equal(masked[image, keep], original[image, keep])
        assert torch.equal(reconstructed[image, keep], original[image, keep])
        assert (masked[image, hidden] == GREY).all()
        assert (reconstructed[image, hidden] != original[image, hidden]).float().mean() > 0.9
