"""Dense k-NN compared with loops over patches, windows and pixels in float64, and its edges."""

import numpy as np
import pytest
import torch

from dmae_ds.evaluate.dense import KnnOptions, measure
from dmae_ds.evaluate.dense_features import embed_chunks
from dmae_ds.evaluate.dense_knn import Memory, Vote, build_memory, draw
from tests.evaluate.dense_case import NO_CLASS, MemorySet, OneProcess, make_network, make_options
from tests.evaluate.test_segmentation_scores import by_loops
from tests.messages import refused

SIZES = [(16, 12), (7, 18), (12, 12), (9, 14)]


def memory_of(network, images, *, num_patches=10**6, seed=0, **kwargs):
    options = make_options(**kwargs)
    return build_memory(
        network, images, options, num_patches=num_patches, seed=seed, processes=OneProcess(), title=None
    )


def patches_by_loops(network, images, *, window, stride, patch):
    """(features, shares of classes, image, place) of every patch of every window, one window at a time."""
    patches = []
    options = make_options(window=window, stride=stride, batch_size=1)
    for (image,) in embed_chunks(network, images, options, processes=OneProcess(), title=None):
        for place, features in zip(image.places, image.features, strict=True):
            label_map = image.sample.label_map[place].numpy()
            for row in range(features.shape[1]):
                for column in range(features.shape[2]):
                    cell = label_map[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                    cell = [int(value) for value in cell.ravel() if value != NO_CLASS]
                    shares = [cell.count(c) / max(1, len(cell)) for c in range(len(images.classes))]
                    vector = features[:, row, column].double().numpy()
                    patches.append((vector, np.array(shares), image.number, place, (row, column)))
    return patches


def vote_by_loops(vector, memory, *, k, temperature):
    """Weighted mean shares of the k patches of the highest cosine, in float64."""
    cosines = [vector @ other / np.linalg.norm(vector) / np.linalg.norm(other) for other, *_ in memory]
    best = sorted(range(len(memory)), key=lambda place: -cosines[place])[:k]
    weights = [np.exp((cosines[place] - cosines[best[0]]) / temperature) for place in best]
    votes = sum(weight * memory[place][1] for weight, place in zip(weights, best, strict=True))
    return votes / sum(weights)


def enlarge_by_loops(grid, height, width, patch):
    """Bilinear values [C, height, width] of a grid [C, h, w] whose cells have `patch` px a side."""
    result = np.zeros((len(grid), height, width))
    for y in range(height):
        for x in range(width):
            row, column = (
                min(max((at + 0.5) / patch - 0.5, 0), n - 1)
                for at, n in zip((y, x), grid.shape[1:], strict=True)
            )
            top, left = int(row), int(column)
            below, right = min(top + 1, grid.shape[1] - 1), min(left + 1, grid.shape[2] - 1)
            dy, dx = row - top, column - left
            upper = (1 - dx) * grid[:, top, left] + dx * grid[:, top, right]
            lower = (1 - dx) * grid[:, below, left] + dx * grid[:, below, right]
            result[:, y, x] = (1 - dy) * upper + dy * lower
    return result


def test_scores_equal_a_loop_over_patches_windows_and_pixels():
    network, window, stride = make_network(), 12, 8
    train, val = MemorySet(SIZES, seed=1, empty=[2]), MemorySet([(13, 12), (6, 17)], seed=2)
    memory = [one for one in patches_by_loops(network, train, window=window, stride=stride, patch=4)]
    memory = [one for one in memory if one[1].any()]
    ours = memory_of(network, train)
    assert np.allclose(ours.features, np.stack([one[0] for one in memory]), atol=1e-5)
    assert np.allclose(ours.labels, np.stack([one[1] for one in memory]), atol=1e-7)
    queries = patches_by_loops(network, val, window=window, stride=stride, patch=4)
    votes = [vote_by_loops(one[0], memory, k=7, temperature=0.02) for one in queries]
    vote = Vote(ours, k=7, temperature=0.02, memory_gib=1)
    assert np.allclose(
        vote(torch.from_numpy(np.stack([one[0] for one in queries])).float()), votes, atol=1e-4
    )
    predicted, expected = [], []
    for number, sample in enumerate(val.samples):
        height, width = sample.label_map.shape
        total, count = np.zeros((3, height, width)), np.zeros((height, width))
        for name, place in {str(one[3]): one[3] for one in queries if one[2] == number}.items():
            rows, columns = (side.stop - side.start for side in place)
            grid = np.zeros((3, -(-rows // 4), -(-columns // 4)))
            for one, shares in zip(queries, votes, strict=True):
                if one[2] == number and str(one[3]) == name:
                    grid[(slice(None), *one[4])] = shares
            total[(slice(None), *place)] += enlarge_by_loops(grid, rows, columns, 4)
            count[place] += 1
        predicted.append((total / count).argmax(axis=0).ravel())
        expected.append(sample.label_map.numpy().ravel())
    slow = by_loops(np.concatenate(predicted), np.concatenate(expected), 3)
    task = KnnOptions(k=7)
    scores = measure(network, train, val, make_options(), task, processes=OneProcess(), is_shown=False)
    assert scores == pytest.approx(slow, abs=1e-9) and 40 < scores["miou"] < 100


def test_the_memory_takes_equally_many_patches_of_every_image_by_seed_and_key():
    network, images = make_network(), MemorySet([(16, 16)] * 4, seed=3)
    kwargs = {"window": 16, "stride": 16}
    whole, some = memory_of(network, images, **kwargs), memory_of(network, images, num_patches=21, **kwargs)
    again, other = (memory_of(network, images, num_patches=21, seed=s, **kwargs) for s in (0, 1))
    assert len(whole.features) == 4 * 16 and len(some.features) == 4 * 5
    assert torch.equal(some.features, again.features) and not torch.equal(some.features, other.features)
    places = [(whole.features == row).all(dim=1).nonzero().item() for row in some.features]
    assert [place // 16 for place in places] == sorted([0, 1, 2, 3] * 5) and places == sorted(places)
    assert torch.equal(draw(torch.tensor([1, 0, 1, 1]) > 0, 9, seed=0, key="x"), torch.tensor([0, 2, 3]))
    assert len(memory_of(network, images, num_patches=1, **kwargs).features) == 4  # one an image at least


def test_a_class_that_only_val_has_and_a_single_class():
    network, options = make_network(), make_options(size=12)
    train, val = MemorySet(SIZES, used=2), MemorySet(SIZES[:2], seed=5, num_classes=3)
    kwargs = {"processes": OneProcess(), "is_shown": False}
    assert (val.samples[0].label_map == 2).any()
    scores = measure(network, train, val, options, KnnOptions(k=3), **kwargs)
    assert scores["miou"] < 67 and scores["mean_accuracy"] < 67
    one = MemorySet(SIZES, num_classes=1)
    scores = measure(network, one, one, options, KnnOptions(k=3), **kwargs)
    assert scores == {"miou": 100, "mean_accuracy": 100, "pixel_accuracy": 100}


def test_sets_without_a_class_few_patches_and_features_that_are_not_finite_are_refused():
    network, options = make_network(), make_options()
    images, empty = MemorySet(SIZES), MemorySet(SIZES[:2], empty=[0, 1])
    kwargs = {"processes": OneProcess(), "is_shown": False}
    with refused("data.train", "no pixel"):
        measure(network, empty, images, options, KnnOptions(), **kwargs)
    with refused("no pixel"):
        measure(network, images, empty, options, KnnOptions(k=2), **kwargs)
    with refused("--k 9999", "patches"):
        measure(network, images, images, options, KnnOptions(k=9999), **kwargs)
    with refused("finite"):
        Vote(Memory(torch.full((4, 2), torch.nan), torch.ones(4, 3)), k=1, temperature=1, memory_gib=1)
