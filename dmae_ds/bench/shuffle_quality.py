"""Measures how well our order and other shuffles mix batches: `python -m dmae_ds.bench.shuffle_quality`.

The worst case is a data set whose shards hold one class each (if shards were shuffled when they were made,
every weakness is hidden). Three figures: the number of different classes in a batch; the chi-square of the
classes per degree of freedom (1: as from a uniform shuffle with replacement, slightly less: without
replacement, larger: classes repeat within a batch); and how often two samples of a batch are together again
in the next epoch, relative to chance.

The other shuffles are written from their documentation: webdataset's shuffle of shards, split over readers,
with a buffer for each reader; MosaicML streaming's py1e over canonical nodes (shards in a random order, cut
into spans of nodes, each sample moved by up to half a block within its span).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator

import numpy as np

from dmae_ds.data.order import batch_positions, sample_ids

Epochs = Callable[[int], np.ndarray]  # epoch -> [batches, global batch] of ids


def ours(num_samples: int, batch: int, *, block: int) -> Epochs:
    """The order of dmae_ds/data/order.py."""

    def epoch(number: int) -> np.ndarray:
        first = number * num_samples // batch + 1
        steps = range(first, first + num_samples // batch - 1)
        return np.stack(
            [
                sample_ids(
                    batch_positions(
                        step,
                        global_batch=batch,
                        rank=0,
                        world_size=1,
                        micro_batch=batch,
                        accumulation_step=0,
                        num_samples=num_samples,
                        block=block,
                    ),
                    num_samples=num_samples,
                    seed=0,
                    block=block,
                )[1]
                for step in steps
            ]
        )

    return epoch


def uniform(num_samples: int, batch: int) -> Epochs:
    """A uniform permutation in every epoch."""

    def epoch(number: int) -> np.ndarray:
        return _cut(np.random.default_rng(number).permutation(num_samples), batch)

    return epoch


def webdataset(num_samples: int, batch: int, *, shard_size: int, readers: int, buffer: int) -> Epochs:
    """Shards are shuffled and split over readers; each reader draws from a buffer that it keeps full."""

    def read(shards: list[int], rng: random.Random) -> Iterator[int]:
        held: list[int] = []
        for shard in shards:
            for sample in range(shard * shard_size, (shard + 1) * shard_size):
                held.append(sample)
                if len(held) >= buffer:
                    yield _pop(held, rng)
        while held:
            yield _pop(held, rng)

    def epoch(number: int) -> np.ndarray:
        shards = list(range(num_samples // shard_size))
        random.Random(number).shuffle(shards)
        streams = [
            np.fromiter(read(shards[reader::readers], random.Random(f"{number} {reader}")), np.int64)
            for reader in range(readers)
        ]
        shortest = min(map(len, streams)) // (batch // readers) * (batch // readers)
        # [readers, batches, batch / readers] -> [batches, batch]
        blocks = np.stack([stream[:shortest] for stream in streams]).reshape(readers, -1, batch // readers)
        return blocks.swapaxes(0, 1).reshape(-1, batch)

    return epoch


def streaming_py1e(
    num_samples: int, batch: int, *, shard_size: int, nodes: int, block: int = 2**18
) -> Epochs:
    """Each sample moves by up to half a block in its node's span; batches take from all nodes in turn."""

    def epoch(number: int) -> np.ndarray:
        rng = np.random.default_rng(number)
        shards = rng.permutation(num_samples // shard_size)
        ids = (shards[:, None] * shard_size + np.arange(shard_size)).reshape(-1)
        spans = []
        for span in np.array_split(ids, nodes):
            half = block / 2
            spans.append(
                span[np.argsort(np.arange(len(span)) + rng.uniform(-half, half, len(span)), kind="stable")]
            )
        shortest = min(map(len, spans))
        return _cut(np.stack([span[:shortest] for span in spans], axis=1).reshape(-1), batch)

    return epoch


def measure(epochs: Epochs, *, num_classes: int, shard_size: int) -> tuple[float, float, float]:
    """Compute (classes in a batch, chi-square per degree of freedom, pairs that meet again over chance)."""
    first, second = epochs(0), epochs(1)
    counts = np.stack([np.bincount(batch // shard_size, minlength=num_classes) for batch in first])
    expected = first.shape[1] / num_classes
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1).mean() / (num_classes - 1)
    where = np.full(int(max(first.max(), second.max())) + 1, -1)
    where[second.reshape(-1)] = np.repeat(np.arange(len(second)), second.shape[1])
    again = pairs = 0
    for batch in first:
        batches = where[batch]
        counts_again = np.bincount(batches[batches >= 0])
        num = counts_again.sum()
        again += (counts_again * (counts_again - 1) // 2).sum()
        pairs += num * (num - 1) // 2
    classes = (counts > 0).sum(axis=1).mean()
    return float(classes), float(chi_square), float(again / pairs * len(second))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Mixing of batches, ours and others', where every shard holds one class."
    )
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--shard-size", type=int, default=1281)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--readers", type=int, default=64, help="readers of webdataset: ranks x workers")
    args = parser.parse_args()
    n, batch, size = args.classes * args.shard_size, args.batch, args.shard_size
    ways = {
        "uniform shuffle": uniform(n, batch),
        **{f"ours, block {block}": ours(n, batch, block=block) for block in (1, 16, 64, 256)},
        **{
            f"streaming py1e, {nodes} canonical nodes": streaming_py1e(n, batch, shard_size=size, nodes=nodes)
            for nodes in (1, 8)
        },
        **{
            f"webdataset, buffer {buffer}": webdataset(
                n, batch, shard_size=size, readers=args.readers, buffer=buffer
            )
            for buffer in (1000, 5000)
        },
    }
    print(
        f"{args.classes} shards x {size}, one class each, batch {batch}, {args.readers} readers of webdataset"
    )
    print(f"{'':<36}{'classes':>9}{'chi2/dof':>10}{'pairs':>8}")
    for name, epochs in ways.items():
        classes, chi_square, pairs = measure(epochs, num_classes=args.classes, shard_size=size)
        print(f"{name:<36}{classes:>9.0f}{chi_square:>10.2f}{pairs:>8.2f}", flush=True)


def _pop(held: list[int], rng: random.Random) -> int:
    place = rng.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


def _cut(ids: np.ndarray, batch: int) -> np.ndarray:
    return ids[: len(ids) // batch * batch].reshape(-1, batch)


if __name__ == "__main__":
    main()
