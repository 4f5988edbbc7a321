"""Features of images of any size: positions, rotary angles, padding, chunks, and shares of classes."""

import numpy as np
import pytest
import timm
import torch

from dmae_ds.data.shards import ShardError
from dmae_ds.evaluate.dense_features import (
    DenseOptions,
    embed_chunks,
    load_numbered,
    patch_labels,
    resize_short_side,
)
from dmae_ds.models.positions import is_sincos, sincos_positions, stretch_positions
from tests.evaluate.dense_case import MEAN, NO_CLASS, STD, MemorySet, OneProcess, make_network, make_options
from tests.messages import refused


def images_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_features_of_the_own_size_are_timms_and_other_sizes_do_not_change_them():
    network, images = make_network(), images_of(2, 3, 16, 16)
    expected = network.vit.forward_features(images)[:, 1:]
    for size in ((16, 16), (9, 30), (24, 16), (16, 16)):
        features = network(images_of(2, 3, *size)) if size != (16, 16) else network(images)
        assert features.shape == (2, 24, -(-size[0] // 4), -(-size[1] // 4))
    assert torch.equal(features.flatten(2).transpose(1, 2), expected)


@torch.no_grad()
def test_sides_that_are_no_multiple_of_the_patch_are_padded_with_the_mean_pixel():
    network, images = make_network(), images_of(1, 3, 13, 18)
    padded = torch.zeros(1, 3, 16, 20)
    padded[:, :, :13, :18] = images
    assert torch.equal(network(images), network(padded))


def test_sincos_positions_are_computed_between_the_old_places_and_learned_ones_interpolated():
    fixed = sincos_positions(24, (4, 4)) + torch.nn.functional.pad(torch.ones(1, 1, 24), (0, 0, 0, 16))
    assert is_sincos(fixed[:, 1:], (4, 4)) and not is_sincos(fixed[:, 1:] + 0.01, (4, 4))
    stretched = stretch_positions(fixed, num_prefix=1, old=(4, 4), new=(8, 2))
    assert torch.equal(stretched[:, 1:], sincos_positions(24, (8, 2), span=(4, 4))[:, 1:])
    assert torch.equal(stretched[:, :1], fixed[:, :1])
    learned = images_of(1, 18, 24)
    resized = stretch_positions(learned, num_prefix=2, old=(4, 4), new=(3, 5))
    assert resized.shape == (1, 2 + 15, 24) and torch.equal(resized[:, :2], learned[:, :2])
    expected = torch.nn.functional.interpolate(
        learned[:, 2:].transpose(1, 2).unflatten(2, (4, 4)), (3, 5), mode="bicubic", antialias=True
    )
    assert torch.allclose(resized[:, 2:], expected.flatten(2).transpose(1, 2), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224"])
def test_rotary_positions_are_those_of_the_images_grid(name):
    shape = {"embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0, "patch_size": 4}
    network, images = make_network(name=name), images_of(1, 3, 24, 12)
    tall = timm.create_model(name, img_size=(24, 12), **shape).eval()
    weights = {key: value for key, value in network.vit.state_dict().items() if key != "pos_embed"}
    tall.load_state_dict(weights, strict=False)
    before = network(images_of(1, 3, 16, 16))
    features = network(images)
    if tall.pos_embed is not None:
        tall.pos_embed.copy_(network.vit.pos_embed)
    expected = tall.forward_features(images)[:, network.num_prefix :]
    assert torch.allclose(features.flatten(2).transpose(1, 2), expected, atol=1e-5)
    assert torch.equal(network(images_of(1, 3, 16, 16)), before)


@torch.no_grad()
def test_every_window_is_embedded_alike_alone_and_in_a_chunk():
    network, options = make_network(), make_options()
    images = MemorySet([(16, 12), (7, 30), (12, 12), (11, 13)])
    chunks = list(embed_chunks(network, images, options, processes=OneProcess(), title=None))
    assert [[image.number for image in chunk] for chunk in chunks] == [[0, 1, 2], [3]]
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
    for image in (image for chunk in chunks for image in chunk):
        pixels = (image.sample.image / 255 - mean) / std
        for place, features in zip(image.places, image.features, strict=True):
            assert torch.allclose(features, network(pixels[(..., *place)][None])[0], atol=1e-5)
    assert [len(image.places) for chunk in chunks for image in chunk] == [2, 4, 1, 2]


def test_two_ranks_share_the_chunks_and_each_has_the_same_bits():
    network, options = make_network(), make_options(batch_size=2)
    images = MemorySet([(12, 12)] * 5 + [(9, 15)] * 2)
    (alone,) = [list(embed_chunks(network, images, options, processes=OneProcess(), title=None))]
    shared = []
    for rank in range(2):
        process = OneProcess()
        process.num_processes, process.process_index = 2, rank
        shared.append(list(embed_chunks(network, images, options, processes=process, title=None)))
    assert [len(chunks) for chunks in shared] == [2, 2]
    for number, chunk in enumerate(alone):
        for one, other in zip(chunk, shared[number % 2][number // 2], strict=True):
            assert one.number == other.number
            assert all(torch.equal(*pair) for pair in zip(one.features, other.features, strict=True))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 13), (1, 5)])
def test_shares_of_classes_equal_a_loop(height, width):
    label_map = np.random.default_rng(height).integers(0, 5, (height, width))
    label_map[label_map == 4] = NO_CLASS
    label_map[:4, :4] = NO_CLASS
    shares = patch_labels(torch.from_numpy(label_map), 4, num_classes=4, no_class=NO_CLASS).numpy()
    expected = []
    for top in range(0, height, 4):
        for left in range(0, width, 4):
            cell = [c for c in label_map[top : top + 4, left : left + 4].ravel() if c != NO_CLASS]
            expected.append([cell.count(which) / max(1, len(cell)) for which in range(4)])
    assert np.allclose(shares, expected, atol=1e-7) and not shares[0].any()


def test_the_short_side_is_resized_and_the_shape_kept():
    image = torch.randint(0, 255, (3, 30, 20), dtype=torch.uint8)
    assert resize_short_side(image, 10).shape == (3, 15, 10)
    assert resize_short_side(image, 0) is image is resize_short_side(image, 20)
    assert resize_short_side(torch.zeros(3, 1, 400, dtype=torch.uint8), 4).shape == (3, 4, 1600)


def test_sizes_that_are_not_given_follow_the_patch():
    class Data:
        mean, std, num_workers = MEAN, STD, 0

    options = DenseOptions.of(Data, patch_size=16, batch_size=8)
    assert (options.size, options.window, options.stride) == (512, 512, 341)
    options = DenseOptions.of(Data, patch_size=4, batch_size=8, size=0)
    assert (options.size, options.window, options.stride) == (0, 128, 85)
    for wrong in ({"window": 15}, {"stride": 0}, {"stride": 513}, {"size": -1}, {"batch_size": 0}):
        with refused("window", "stride"):
            DenseOptions.of(Data, **{"patch_size": 16, "batch_size": 8, **wrong})


def test_a_damaged_image_in_a_worker_is_an_error_of_this_rank_alone():
    def read(number):
        raise ShardError(f"image {number}")

    with refused("image 7") as error:
        list(load_numbered(read, range(7, 9), num_workers=1))
    assert error.value.of_one_rank
