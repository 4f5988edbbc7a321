"""Messages that the ranks of a teacher's group exchange on one pipeline tick, as bytes of fixed sizes.

A message from stage i to stage j is a header, the sender's embedded tokens where j is the first stage, all
owners' outputs where j is the next stage, and finished features where stage i taps batches of owner j. Every
section has a fixed size and an aligned start, so that sizes never have to be agreed on; the header tells how
much of it is filled. Sending is the work of pipeline.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmae_ds.errors import RunFailed

_ALIGN = 16  # bytes


@dataclass
class StageInput:
    """One owner's micro-batch at a stage: tokens [n, R + T, D], and patch ids [n, T] for rotary positions."""

    tokens: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Layout:
    """Sizes of a message's sections: the same on every tick of a run, and on every rank.

    taps_of: [owner][stage], the taps that a stage returns to an owner, in this order
    home_shapes: (tokens, width) of an image's features by tap
    micro_batch: number of images of the first batch; no later one may have more
    """

    taps_of: tuple[tuple[tuple[str, ...], ...], ...]
    micro_batch: int
    tokens_shape: tuple[int, int]
    num_ids: int
    home_shapes: dict[str, tuple[int, int]]
    dtype: torch.dtype

    @property
    def num_stages(self) -> int:
        return len(self.taps_of)

    @property
    def header_shape(self) -> tuple[int]:
        """Shape of the int64 header: tick, number of own images, and of each owner's in the outputs."""
        return (2 + self.num_stages,)

    @property
    def header(self) -> int:
        return _aligned(8 * self.header_shape[0])

    @property
    def stage_input(self) -> int:
        return self._tokens + self._ids

    @property
    def _tokens(self) -> int:
        return _aligned(self.micro_batch * self.tokens_shape[0] * self.tokens_shape[1] * self.dtype.itemsize)

    @property
    def _ids(self) -> int:
        return _aligned(self.micro_batch * self.num_ids * 8)

    def home(self, tap: str) -> int:
        """Bytes of a tap's features."""
        tokens, width = self.home_shapes[tap]
        return _aligned(self.micro_batch * tokens * width * self.dtype.itemsize)

    def size(self, source: int, target: int) -> int:
        """Bytes of the message from stage `source` to stage `target`."""
        tokens = (target == 0) + self.num_stages * (target == source + 1)
        home = sum(self.home(tap) for tap in self.taps_of[target][source])
        return self.header + tokens * self.stage_input + home

    def write(
        self,
        message: Tensor,
        *,
        source: int,
        target: int,
        tick: int,
        mine: StageInput | None,
        outputs: dict[int, StageInput],
        home: dict[str, Tensor],
    ) -> None:
        """Fill a message [size] uint8.

        mine: the sender's embedded micro-batch; outputs: of stage `source`, by owner
        home: features for owner `target`, by tap
        """
        assert mine is None or len(mine.tokens) <= self.micro_batch, (
            "a later micro-batch is larger than the first"
        )
        forward = outputs if target == source + 1 else {}
        counts = [len(forward[owner].tokens) if owner in forward else 0 for owner in range(self.num_stages)]
        cursor = _Cursor(message)
        header = torch.tensor([tick, 0 if mine is None else len(mine.tokens), *counts])
        cursor.write(header.to(message.device, non_blocking=True), self.header)
        if target == 0:
            self._write_input(cursor, mine)
        if target == source + 1:
            for owner in range(self.num_stages):
                self._write_input(cursor, forward.get(owner))
        for tap in self.taps_of[target][source]:
            cursor.write(home.get(tap), self.home(tap))

    def headers(self, received: Tensor, target: int) -> Tensor:
        """Headers of every stage's message, [P, 2 + P] int64, on the message's device."""
        sizes = [self.size(source, target) for source in range(self.num_stages)]
        length = 8 * self.header_shape[0]
        return torch.stack([message[:length].view(torch.int64) for message in received.split(sizes)])

    def read_work(
        self, received: Tensor, headers: list[list[int]], *, target: int, tick: int
    ) -> dict[int, StageInput]:
        """Micro-batches that stage `target` has to run, by owner: views into `received`.

        headers: of all messages, on the host
        Raises RunFailed where a rank of the group is at another tick.
        """
        sizes = [self.size(source, target) for source in range(self.num_stages)]
        work: dict[int, StageInput] = {}
        messages = zip(received.split(sizes), headers, strict=True)
        for source, (message, (source_tick, mine, *counts)) in enumerate(messages):
            if source_tick != tick:
                raise RunFailed(
                    f"the teacher's stream is out of step: stage {target + 1} of the group is at tick "
                    f"{tick}, stage {source + 1} at {source_tick}"
                )
            cursor = _Cursor(message, self.header)
            if target == 0 and mine:
                work[source] = self._read_input(cursor, mine)
            if target == source + 1:
                for owner, count in enumerate(counts):
                    stage_input = self._read_input(cursor, count)
                    if stage_input is not None:
                        work[owner] = stage_input
        return work

    def read_home(self, received: Tensor, *, source: int, owner: int, count: int) -> dict[str, Tensor]:
        """Features {tap: [count, K', D]} that stage `source` returned to `owner`: views into `received`."""
        sizes = [self.size(stage, owner) for stage in range(self.num_stages)]
        tokens = (owner == 0) + self.num_stages * (owner == source + 1)
        cursor = _Cursor(received.split(sizes)[source], self.header + tokens * self.stage_input)
        return {
            tap: cursor.read(self.dtype, (count, *self.home_shapes[tap]), self.home(tap))
            for tap in self.taps_of[owner][source]
        }

    def _write_input(self, cursor: _Cursor, stage_input: StageInput | None) -> None:
        cursor.write(None if stage_input is None else stage_input.tokens, self._tokens)
        cursor.write(None if stage_input is None else stage_input.ids, self._ids)

    def _read_input(self, cursor: _Cursor, count: int) -> StageInput | None:
        tokens = cursor.read(self.dtype, (count, *self.tokens_shape), self._tokens)
        ids = cursor.read(torch.int64, (count, self.num_ids), self._ids)
        return StageInput(tokens, ids) if count else None


class _Cursor:
    """A position in a message, in which tensors follow each other, each in a section of fixed size."""

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
        section = self.message[self.place : self.place + count]
        self.place += size
        return section.view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
