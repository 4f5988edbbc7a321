"""The search in blocks compared with one float64 product: equal to the last bit for any blocks."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from dmae_ds.evaluate import neighbours
from dmae_ds.evaluate.neighbours import GIB, Blocks, choose_blocks, extra_bytes, nearest
from tests.messages import refused

IMAGENET = {"num_train": 1_281_167, "dim": 768, "num_classes": 1000}


def random_rows(num, seed, dim=12):
    """float32 rows of very different lengths."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        rng.normal(size=(num, dim)).astype(np.float32) * rng.uniform(0.1, 9, (num, 1)).astype(np.float32)
    )


def search(train, queries, *, k, blocks):
    cosines, rows = zip(*nearest(train, queries, k=k, blocks=blocks), strict=True)
    return torch.cat(cosines), torch.cat(rows)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that small sets fill many of them."""
    monkeypatch.setattr(neighbours, "TILE", Blocks(8, 16))


@pytest.mark.parametrize(
    "num_train, num_queries, dim, k",
    [(300, 50, 12, 7), (16, 8, 1, 16), (17, 9, 5, 1), (1000, 1, 33, 100), (5, 30, 3, 5)],
)
def test_the_search_finds_what_one_product_finds(small_tiles, num_train, num_queries, dim, k):
    train, queries = random_rows(num_train, 1, dim), random_rows(num_queries, 2, dim)
    if dim == 1:
        train[::2] *= -1  # only cosines of -1 and 1, so the lowest rows come first
    cosines, rows = search(train, queries, k=k, blocks=Blocks(16, 48))
    expected = functional.normalize(queries.double(), dim=1) @ functional.normalize(train.double(), dim=1).T
    best, order = expected.round(decimals=12).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(cosines, best[:, :k], rtol=0, atol=1e-12)
    assert torch.equal(rows, order[:, :k])


@pytest.mark.parametrize("what", ["random", "many equal", "all equal", "zeros"])
def test_the_blocks_change_no_bit(small_tiles, what):
    train, queries = random_rows(500, 3), random_rows(41, 4)
    if what == "many equal":
        train[40:140] = queries[:5].repeat(20, 1)
        train[300:400] = train[40:140] * 2
    elif what == "all equal":
        train[:] = train[0]
    elif what == "zeros":
        train[10:480], queries[3] = 0, 0
    first, *others = [
        search(train, queries, k=60, blocks=Blocks(*blocks))
        for blocks in ((8, 16), (8, 512), (48, 32), (16, 160), (64, 4096))
    ]
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
    if what == "all equal":
        assert torch.equal(first[1], torch.arange(60).expand(41, 60))
    assert (first[0].diff(dim=1) <= 0).all()


def test_the_blocks_change_no_bit_with_tiles_of_the_real_size():
    train, queries = random_rows(9000, 5), random_rows(300, 6)
    one, other = (
        search(train, queries, k=20, blocks=blocks) for blocks in (Blocks(256, 4096), Blocks(512, 12288))
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_neighbours_that_are_equal_in_float32_are_ordered_by_float64(small_tiles):
    train = -torch.ones(300, 4)
    # 30 rows whose cosines to (1, 1, 1, 1) differ by at most 1e-10; the last is the nearest.
    near = torch.arange(5, 300, 10)
    train[near] = 1
    train[near, 0] += torch.linspace(3e-5, 0, 30)
    cosines, rows = search(train, torch.ones(1, 4), k=5, blocks=Blocks(8, 16))
    assert cosines.float().unique().numel() < 3 and rows[0].tolist() == near.flip(0)[:5].tolist()


def test_the_highest_cosines_are_found_where_all_are_negative(small_tiles):
    train, queries = random_rows(300, 7).abs(), -random_rows(20, 8).abs()
    cosines, rows = search(train, queries, k=4, blocks=Blocks(8, 32))
    expected = functional.normalize(queries.double(), dim=1) @ functional.normalize(train.double(), dim=1).T
    assert (cosines < 0).all() and torch.equal(rows, expected.topk(4, dim=1).indices)


@pytest.mark.parametrize("memory_gib", [0.1, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 20, 200])
def test_blocks_are_the_largest_within_the_memory(memory_gib, k):
    blocks = choose_blocks(num_queries=50_000, k=k, memory_gib=memory_gib, **IMAGENET)
    assert blocks.queries % 256 == 0 == blocks.train % 4096
    assert (
        extra_bytes(blocks, k=k, **IMAGENET)
        <= memory_gib * GIB
        < extra_bytes(Blocks(blocks.queries + 256, blocks.train), k=k, **IMAGENET)
    )


def test_imagenet_in_four_gib_and_small_sets_in_one_block():
    blocks = choose_blocks(num_queries=50_000, k=200, memory_gib=4.0, **IMAGENET)
    assert blocks.queries > 4096 and extra_bytes(blocks, k=200, **IMAGENET) < 4 * GIB
    assert choose_blocks(
        num_queries=397, num_train=1400, dim=64, k=20, num_classes=10, memory_gib=1.0
    ) == Blocks(512, 4096)
    assert choose_blocks(num_queries=0, num_train=3, dim=64, k=1, num_classes=10, memory_gib=1.0) == Blocks(
        256, 4096
    )


def test_too_little_memory_is_refused_with_the_memory_it_requires():
    with refused("--memory-gib 0.01", "1,281,167", 768, "0.04 GiB"):
        choose_blocks(num_queries=50_000, k=20, memory_gib=0.01, **IMAGENET)
