"""The k training rows most similar to each query by cosine, exactly, in blocks, without an N x N matrix.

There are two passes. The first computes the cosines of all pairs in float32 and keeps a running top-(k +
MARGIN). The second computes those few again in float64, summed in a fixed order, and decides. Every matrix
product has the same shape and place for any blocks (TILE, with the edges filled with zeros), and a cosine and
its row make one integer without ties. So the answer is the same to the last bit for any blocks: the highest
cosine first, and the lowest row first among equal cosines.
"""

from __future__ import annotations

import math
from typing import Iterator, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dmae_ds.errors import UserError
from dmae_ds.models.numerics import fp32_products
from dmae_ds.output.units import GIB

# Candidates beyond k. Rounding in float32 is about 1e-6 of a cosine; it affects the choice only if more rows
# than these are that close to the k-th, as with a collapsed student.
MARGIN = 32
_ID_BITS = 32
_LOWEST = torch.iinfo(torch.int64).min


class Blocks(NamedTuple):
    """Numbers of queries and training rows that are compared at a time; multiples of TILE."""

    queries: int
    train: int


TILE = Blocks(256, 4096)  # the size of one matrix product
_WIDEST = 16 * TILE.train  # training rows; picking from more is not faster


def extra_bytes(blocks: Blocks, *, num_train: int, dim: int, k: int, num_classes: int = 0) -> int:
    """Peak memory in bytes of a search and a vote, in addition to the features and the answers."""
    candidates = min(k + MARGIN, num_train)
    norms = num_train * (8 + 4)
    squares = TILE.train * dim * 8
    picked = blocks.queries * (blocks.train + candidates) * 8 + blocks.queries * candidates * (8 + 8)
    tile = TILE.queries * TILE.train * (4 + 4) + (TILE.queries + TILE.train) * dim * 4
    decided = blocks.queries * candidates * 8 + TILE.queries * (
        3 * dim * 8 + candidates * 5 * 8 + num_classes * (8 + 8 + 8)
    )
    return norms + max(squares, picked + max(tile, decided))


def choose_blocks(
    *, num_queries: int, num_train: int, dim: int, k: int, num_classes: int, memory_gib: float
) -> Blocks:
    """Choose the largest blocks whose `extra_bytes` stay within memory_gib.

    Raises UserError if the smallest blocks need more.
    """
    sizes = {"num_train": num_train, "dim": dim, "k": k, "num_classes": num_classes}
    wanted = Blocks(
        _round_up(max(1, num_queries), TILE.queries), min(_WIDEST, _round_up(num_train, TILE.train))
    )
    train = wanted.train
    while True:
        # Memory grows linearly with the queries of a block.
        least = extra_bytes(Blocks(TILE.queries, train), **sizes)
        each = extra_bytes(Blocks(2 * TILE.queries, train), **sizes) - least
        tiles = (
            1 + max(0, math.floor((memory_gib * GIB - least) / each))
            if each
            else wanted.queries // TILE.queries
        )
        if least <= memory_gib * GIB:
            return Blocks(min(wanted.queries, tiles * TILE.queries), train)
        if train == TILE.train:
            raise UserError(
                f"--memory-gib {memory_gib:g} (in a recipe eval.memory_gib): a search in {num_train:,} "
                f"training rows of width {dim} requires at least {least / GIB:.2f} GiB in addition to the "
                "features; raise it to that"
            )
        train = max(TILE.train, _round_up(train // 2, TILE.train))


def nearest(train: Tensor, queries: Tensor, *, k: int, blocks: Blocks) -> Iterator[tuple[Tensor, Tensor]]:
    """Find the neighbours of TILE.queries queries at a time, in order.

    train [N, D], queries [M, D]: float32, finite, on one device; k <= N; blocks: multiples of TILE
    Yields cosines [m, k] float64, the highest first, and training rows [m, k] int64.
    """
    assert train.dtype == queries.dtype == torch.float32 and 1 <= k <= len(train) < 2**_ID_BITS
    assert blocks.queries % TILE.queries == 0 == blocks.train % TILE.train
    norms = _norms(train)
    scale = (1 / norms).float()
    candidates = min(k + MARGIN, len(train))
    for block in queries.split(blocks.queries):
        with fp32_products(train.device, tf32=False):  # near neighbours differ by less than TF32 keeps
            best = _candidates(train, scale, block, num=candidates, rows=blocks.train)  # [B, candidates]
        for some, rows in zip(block.split(TILE.queries), best.split(TILE.queries), strict=True):
            yield _decide(train, norms, some, rows, k=k)


def _candidates(train: Tensor, scale: Tensor, queries: Tensor, *, num: int, rows: int) -> Tensor:
    """The rows [B, num] of the highest cosines in float32, unordered."""
    width = min(rows, _round_up(len(train), TILE.train))
    # The keys of the best so far, followed by the keys of a block of training rows.
    keys = torch.full((len(queries), num + width), _LOWEST, dtype=torch.int64, device=train.device)
    for start in range(0, len(train), rows):
        stop = min(start + rows, len(train))
        for first in range(start, stop, TILE.train):
            part = slice(first, min(first + TILE.train, stop))
            tile, factors = _fill(train[part], TILE.train), scale[part]
            for place in range(0, len(queries), TILE.queries):
                some = queries[place : place + TILE.queries]
                # The length of a query does not change the order of its rows, so it is not divided by.
                similar = (_fill(some, TILE.queries) @ tile.T)[: len(some), : len(factors)].mul_(factors)
                column = num + first - start
                _pack(similar, first, out=keys[place : place + len(some), column : column + len(factors)])
        keys[:, :num] = keys[:, : num + stop - start].topk(num, dim=1, sorted=False).values
    return _unpack(keys[:, :num])


def _decide(train: Tensor, norms: Tensor, queries: Tensor, rows: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k best candidates by cosine in float64; among equal cosines the lowest rows."""
    rows = rows.sort(dim=1).values  # [m, candidates]
    exact = queries.double()
    cosines = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    for place in range(rows.shape[1]):
        # A product of two float32 numbers is exact in float64.
        cosines[:, place] = _sum_in_order(train[rows[:, place]].double().mul_(exact)) / norms[rows[:, place]]
    cosines /= _norms(queries)[:, None]
    cosines, order = cosines.sort(dim=1, descending=True, stable=True)
    return cosines[:, :k], rows.gather(1, order[:, :k])


def _norms(rows: Tensor) -> Tensor:
    """Lengths [n] float64 of rows [n, D]; a row of zeros gets a small length, and so cosines of 0."""
    norms = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    # One buffer for all: small results between large temporary buffers would keep the allocator from reusing
    # those.
    piece = torch.empty(min(TILE.train, len(rows)), rows.shape[1], dtype=torch.float64, device=rows.device)
    for some, out in zip(rows.split(TILE.train), norms.split(TILE.train), strict=True):
        out.copy_(_sum_in_order(piece[: len(some)].copy_(some).square_()))
    return norms.sqrt_().clamp_min_(1e-12)


def _sum_in_order(terms: Tensor) -> Tensor:
    """Sum terms [n, D] to [n] by halves: an order that is the same for any device, threads and shape.

    Overwrites `terms` and returns a view of it.
    """
    width = terms.shape[1]
    while width > 1:
        half = (width + 1) // 2
        terms[:, : width - half] += terms[:, half:width]
        width = half
    return terms[:, 0]


def _pack(similar: Tensor, first: int, *, out: Tensor) -> None:
    """Write int64 keys into `out` that sort like (similar, -row).

    similar: [b, n] float32, of the training rows first, first + 1, ...
    """
    bits = similar.view(torch.int32)
    # Read as integers, negative floats sort in reverse; this puts them in order.
    bits = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    places = torch.arange(first, first + similar.shape[1], device=similar.device)
    out.copy_(bits).bitwise_left_shift_(_ID_BITS).add_((1 << _ID_BITS) - 1 - places)


def _unpack(keys: Tensor) -> Tensor:
    """The training rows of keys."""
    return (1 << _ID_BITS) - 1 - (keys & ((1 << _ID_BITS) - 1))


def _fill(rows: Tensor, num: int) -> Tensor:
    return rows if len(rows) == num else functional.pad(rows, (0, 0, 0, num - len(rows)))


def _round_up(number: int, unit: int) -> int:
    return math.ceil(number / unit) * unit
