"""dmae_ds/bench/shuffle_quality.py: the figures tell a good shuffle from a bad one, and ours is good."""

import numpy as np
import pytest

from dmae_ds.bench.shuffle_quality import main, measure, ours, streaming_py1e, uniform, webdataset

CLASSES, SIZE, BATCH = 100, 100, 500
N = CLASSES * SIZE
WAYS = {
    "uniform": uniform(N, BATCH),
    "block 1": ours(N, BATCH, block=1),
    "block 16": ours(N, BATCH, block=16),
    "webdataset": webdataset(N, BATCH, shard_size=SIZE, readers=4, buffer=200),
    "streaming": streaming_py1e(N, BATCH, shard_size=SIZE, nodes=1, block=1000),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_shuffles_a_set_without_repeats(way):
    for epoch in (0, 1):
        ids = WAYS[way](epoch).reshape(-1)
        assert ids.min() >= 0 and ids.max() < N and ids.size > 0.8 * N
        # Ours are cut at batches, not at epochs.
        assert way.startswith("block") or len(np.unique(ids)) == ids.size


def test_our_figures_are_those_of_a_uniform_shuffle_and_those_of_buffers_are_not():
    figures = {way: measure(epochs, num_classes=CLASSES, shard_size=SIZE) for way, epochs in WAYS.items()}
    for way in ("uniform", "block 1"):
        assert 0.85 < figures[way][1] < 1.1 and 0.9 < figures[way][2] < 1.1
    assert figures["block 16"][1] < 2.5 and 0.9 < figures["block 16"][2] < 1.1
    assert figures["webdataset"][1] > 5 and figures["streaming"][1] > 5


def test_the_figures_of_four_batches_by_hand():
    """Two classes of four samples; the first batches hold one class each, the second half of both."""
    epochs = [np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), np.array([[0, 1, 4, 5], [2, 3, 6, 7]])]
    classes, chi_square, again = measure(epochs.__getitem__, num_classes=2, shard_size=4)
    assert (classes, chi_square) == (1, (2**2 + 2**2) / 2)  # of one degree of freedom
    assert again == pytest.approx(2 / 6 * 2)  # two of a batch's six pairs; by chance every second


def test_it_prints_a_table(capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        ["shuffle_quality", "--classes", "20", "--shard-size", "200", "--batch", "128", "--readers", "4"],
    )
    main()
    assert len(capsys.readouterr().out.splitlines()) == 11
