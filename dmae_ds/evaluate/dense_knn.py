"""Dense k-NN: the classes of a patch are those of its nearest training patches (Hummingbird's evaluation).

    dmae-ds eval dense RUN [--task knn] [--k 30] [--temperature 0.02]

After Balazevic et al., "Towards In-context Scene Understanding" (NeurIPS 2023). The memory holds features of
training patches, each with the shares of classes among its pixels. A patch of data.val gets the mean of its k
nearest ones' shares, weighted by softmax(cosine / temperature). Nothing is trained, and nothing is random
except for the draw of the memory, which depends only on the seed and the images' keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dmae_ds.data.dense import DenseSet
from dmae_ds.errors import UserError
from dmae_ds.evaluate.dense_features import (
    DenseNetwork,
    DenseOptions,
    Embedded,
    embed_chunks,
    patch_labels,
    resize_map,
)
from dmae_ds.evaluate.features import Processes
from dmae_ds.evaluate.neighbours import Blocks, choose_blocks, nearest
from dmae_ds.models.numerics import fp32_products

MAX_PATCHES = 2**31  # of an image


class Memory(NamedTuple):
    """Training patches: features [N, D] float32, and shares of classes [N, C] float32, equal on all ranks."""

    features: Tensor
    labels: Tensor


def build_memory(
    network: DenseNetwork,
    dense_set: DenseSet,
    options: DenseOptions,
    *,
    num_patches: int,
    seed: int,
    processes: Processes,
    title: str | None,
) -> Memory:
    """Embed the training images and keep about num_patches patches that have a class. Collective.

    Every image gives equally many, at least one, drawn by (seed, key); all of them where it has fewer.
    Raises UserError where no pixel of the set has a class.
    """
    num_classes, no_class = len(dense_set.classes), dense_set.ignore_index
    each = max(1, num_patches // len(dense_set))
    device = processes.device
    places = [torch.zeros(0, dtype=torch.int64, device=device)]
    features = [torch.zeros(0, network.embed_dim, device=device)]
    labels = [torch.zeros(0, num_classes, device=device)]
    for chunk in embed_chunks(network, dense_set, options, processes=processes, title=title):
        for image in chunk:
            # [D, h, w] of each window -> [L, D] of the image
            rows = torch.cat([one.flatten(1).T for one in image.features])
            shares = labels_of(image, network.patch_size, num_classes=num_classes, no_class=no_class)
            keep = draw(shares.sum(dim=1) > 0, each, seed=seed, key=image.sample.key)
            places.append(image.number * MAX_PATCHES + keep.to(device))
            features.append(rows[keep.to(device)])
            labels.append(shares[keep].to(device))
    places, features, labels = (_gather(torch.cat(some), processes) for some in (places, features, labels))
    if not len(places):
        raise UserError(
            f"no pixel of data.train '{dense_set.shard_set.folder}' has a class, so there is no patch to "
            "compare with; check the folder of masks that the shards were made from"
        )
    order = places.argsort()  # by image, then by patch: the same for any number of ranks
    return Memory(features[order], labels[order])


def labels_of(image: Embedded, patch_size: int, *, num_classes: int, no_class: int) -> Tensor:
    """Shares of classes [L, C] of the patches of an image's windows, after its map was resized with it."""
    label_map = resize_map(image.sample.label_map, (image.height, image.width))
    kinds = {"num_classes": num_classes, "no_class": no_class}
    return torch.cat([patch_labels(label_map[place], patch_size, **kinds) for place in image.places])


def draw(candidates: Tensor, number: int, *, seed: int, key: str) -> Tensor:
    """Rising places [n] int64 of at most `number` of the candidates [L] bool, drawn by (seed, key)."""
    places = candidates.nonzero().flatten()
    if len(places) <= number:
        return places
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    # The raw output is the same in every version of numpy, unlike its permutations.
    draws = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(len(places))
    return places[torch.from_numpy(np.sort(np.argsort(draws, kind="stable")[:number]))]


class Vote:
    """The classes of patches by their nearest ones in the memory: call it with features [M, D].

    Returns weighted mean shares [M, C] float32. Raises UserError where the memory has fewer than k patches,
    features are not finite, or memory_gib is too little for the search.
    """

    def __init__(self, memory: Memory, *, k: int, temperature: float, memory_gib: float):
        if len(memory.features) < k:
            raise UserError(
                f"--k {k} (or eval.dense_k) is more than the {len(memory.features)} training patches "
                "with a class; lower it"
            )
        self.memory, self.k, self.temperature, self.memory_gib = memory, k, temperature, memory_gib
        _check_finite(memory.features)

    def __call__(self, queries: Tensor) -> Tensor:
        assert queries.isfinite().all(), "the memory's features were finite, and these are not"
        features, labels = self.memory
        num_train, dim = features.shape
        blocks = choose_blocks(
            num_queries=len(queries),
            num_train=num_train,
            dim=dim,
            k=self.k,
            num_classes=labels.shape[1],
            memory_gib=self.memory_gib,
        )
        with fp32_products(queries.device, tf32=False):
            return torch.cat([labels[:0], *self._votes(queries, blocks)])

    def _votes(self, queries: Tensor, blocks: Blocks) -> Iterator[Tensor]:
        features, labels = self.memory
        for cosines, rows in nearest(features, queries, k=self.k, blocks=blocks):
            weights = (cosines / self.temperature).softmax(dim=1)
            votes = torch.zeros(len(rows), labels.shape[1], dtype=torch.float64, device=rows.device)
            for place in range(self.k):  # one neighbour of each query at a time: sums in a fixed order
                votes += weights[:, place, None] * labels[rows[:, place]]
            yield votes.float()


def _check_finite(features: Tensor) -> None:
    if not features.isfinite().all():
        raise UserError("the network's features are not finite; check its training with `dmae-ds report`")


def _gather(rows: Tensor, processes: Processes) -> Tensor:
    """Rows of all processes, one process after the other; they may have different numbers. Collective."""
    counts = processes.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
    gathered = processes.gather(torch.cat([rows, padding])).split(max(counts)) if max(counts) else [rows]
    return torch.cat([some[:count] for some, count in zip(gathered, counts, strict=False)])
