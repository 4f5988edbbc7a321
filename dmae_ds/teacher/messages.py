"""What the ranks of a teacher's group send each other at one clock, as bytes of fixed sizes. Nothing is sent here.

A message from stage i to stage j is a header, my embedded tokens where j is the first stage, all owners' outputs where j
is the next stage, and finished features where stage i taps batches of owner j. Every part has a fixed size and begins
where any dtype may, so that sizes never have to be agreed on; the header says how much of it is filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmae_ds.errors import RunFailed

_ALIGN = 16  # bytes


@dataclass
class Travelling:
    """Somebody's micro-batch at a stage: tokens [n, R + T, D], and the patches' places [n, T] for rotary positions."""

    tokens: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Layout:
    """How long each part of a message is: the same at every clock of a run, and on every rank.

    taps_of: [owner][stage], the taps that a stage sends home to an owner, in this order
    micro_batch: images of the first batch; no later one may have more
    """

    taps_of: tuple[tuple[tuple[str, ...], ...], ...]
    micro_batch: int
    tokens_shape: tuple[int, int]
    num_ids: int
    home_shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def num_stages(self) -> int:
        return len(self.taps_of)

    @property
    def header_shape(self) -> tuple[int]:
        """int64: the clock, images of mine, images of each owner in my outputs."""
        return (2 + self.num_stages,)

    @property
    def header(self) -> int:
        return _aligned(8 * self.header_shape[0])

    @property
    def travelling(self) -> int:
        return self._tokens + self._ids

    @property
    def _tokens(self) -> int:
        return _aligned(self.micro_batch * self.tokens_shape[0] * self.tokens_shape[1] * self.dtype.itemsize)

    @property
    def _ids(self) -> int:
        return _aligned(self.micro_batch * self.num_ids * 8)

    @property
    def home(self) -> int:
        return _aligned(self.micro_batch * self.home_shape[0] * self.home_shape[1] * self.dtype.itemsize)

    def size(self, source: int, target: int) -> int:
        """Bytes of the message from stage `source` to stage `target`."""
        tokens = (target == 0) + self.num_stages * (target == source + 1)
        return self.header + tokens * self.travelling + len(self.taps_of[target][source]) * self.home

    def write(
        self,
        message: Tensor,
        *,
        source: int,
        target: int,
        tick: int,
        mine: Travelling | None,
        outputs: dict[int, Travelling],
        home: dict[str, Tensor],
    ) -> None:
        """Fill [size] uint8. outputs: what stage `source` computed, by owner; home: features for owner `target`, by tap."""
        assert mine is None or len(mine.tokens) <= self.micro_batch, (
            "a later micro-batch is larger than the first"
        )
        forward = outputs if target == source + 1 else {}
        counts = [len(forward[owner].tokens) if owner in forward else 0 for owner in range(self.num_stages)]
        cursor = _Cursor(message)
        header = torch.tensor([tick, 0 if mine is None else len(mine.tokens), *counts])
        cursor.write(header.to(message.device, non_blocking=True), self.header)
        if target == 0:
            self._write_travelling(cursor, mine)
        if target == source + 1:
            for owner in range(self.num_stages):
                self._write_travelling(cursor, forward.get(owner))
        for tap in self.taps_of[target][source]:
            cursor.write(home.get(tap), self.home)

    def headers(self, received: Tensor, target: int) -> Tensor:
        """[P, 2 + P] int64: the header of every stage's message, on the message's device."""
        sizes = [self.size(source, target) for source in range(self.num_stages)]
        length = 8 * self.header_shape[0]
        return torch.stack([message[:length].view(torch.int64) for message in received.split(sizes)])

    def read_work(
        self, received: Tensor, headers: list[list[int]], *, target: int, tick: int
    ) -> dict[int, Travelling]:
        """What stage `target` is to run on, by owner: views into `received`. headers: of all messages, on the host.

        Raises RunFailed where a rank of the group is at another clock.
        """
        sizes = [self.size(source, target) for source in range(self.num_stages)]
        work: dict[int, Travelling] = {}
        for source, (message, (found, mine, *counts)) in enumerate(zip(received.split(sizes), headers)):
            if found != tick:
                raise RunFailed(
                    f"the teacher's stream is out of step: stage {target + 1} of the group is at clock {tick}, stage {source + 1} at {found}"
                )
            cursor = _Cursor(message, self.header)
            if target == 0 and mine:
                work[source] = self._read_travelling(cursor, mine)
            if target == source + 1:
                work |= {
                    owner: travelling
                    for owner, count in enumerate(counts)
                    if (travelling := self._read_travelling(cursor, count)) is not None
                }
        return work

    def read_home(self, received: Tensor, *, source: int, owner: int, count: int) -> dict[str, Tensor]:
        """{tap: [count, K', D]} that stage `source` sent home to `owner`: views into `received`."""
        sizes = [self.size(stage, owner) for stage in range(self.num_stages)]
        tokens = (owner == 0) + self.num_stages * (owner == source + 1)
        cursor = _Cursor(received.split(sizes)[source], self.header + tokens * self.travelling)
        return {
            tap: cursor.read(self.dtype, (count, *self.home_shape), self.home)
            for tap in self.taps_of[owner][source]
        }

    def _write_travelling(self, cursor: _Cursor, travelling: Travelling | None) -> None:
        cursor.write(None if travelling is None else travelling.tokens, self._tokens)
        cursor.write(None if travelling is None else travelling.ids, self._ids)

    def _read_travelling(self, cursor: _Cursor, count: int) -> Travelling | None:
        tokens = cursor.read(self.dtype, (count, *self.tokens_shape), self._tokens)
        ids = cursor.read(torch.int64, (count, self.num_ids), self._ids)
        return Travelling(tokens, ids) if count else None


class _Cursor:
    """Tensors one after the other in a message, each in a part of fixed size."""

    def __init__(self, message: Tensor, place: int = 0):
        self.message, self.place = message, place

    def write(self, tensor: Tensor | None, size: int) -> None:
        if tensor is not None:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            assert len(flat) <= size
            self.message[self.place : self.place + len(flat)] = flat
        self.place += size

    def read(self, dtype: torch.dtype, shape: tuple[int, ...], size: int) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        part = self.message[self.place : self.place + count]
        self.place += size
        return part.view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
