"""The teacher as a stream: P frozen stages on P consecutive ranks, all of them busy at every clock.

A frozen teacher needs nothing from the student, so it runs ahead. Every rank embeds its own visible tokens (the embedding
is small and replicated). At each clock a group does ONE all_to_all that carries everything at once: my embedded
micro-batch to stage 0, my stage's outputs of the last clock to the next stage, finished features home to their owners.
Then my stage runs on the P micro-batches that arrived. In steady state nobody waits for a bubble, a rank holds a P-th of
the blocks, and features of batch k are home at clock k + P.

The ordering rule, for whoever adds to it: from one host thread, every rank issues the exchange, its stage's work and the
student's collectives in this order, and the exchange is waited for before the student's first collective. Two
communicators with operations in flight on both (the group's and ZeRO's) may otherwise wait for each other's turn on the
device; NCCL promises no order across communicators. One collective of fixed sizes a clock leaves nothing else to order,
and so nothing to deadlock. Never exchange from a hook or from another thread.

Each owner's micro-batch is run by itself, at its own size: bit-identical to the replicated teacher, and a smaller last
batch is no special case. Nothing of the stream is ever saved: a resumed run fills it again from the data's order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Iterable, Iterator

import torch
from torch import Tensor, distributed, nn

from dmae_ds.dist import TIMEOUT_S
from dmae_ds.errors import RunFailed
from dmae_ds.teacher.frozen import FrozenTeacher, split_tap
from dmae_ds.teacher.identity import Probe, probe

_ALIGN = 16  # bytes: a part of a message begins where any dtype may


@dataclass(frozen=True)
class StageGroup:
    """P consecutive ranks that hold one teacher between them; `stage` is this rank's, from 0."""

    num_stages: int
    stage: int
    rank: int
    handle: distributed.ProcessGroup


def join_group(num_stages: int) -> StageGroup:
    """Make every group of the world, in the same order on every rank, warm it up, and return this rank's. Collective."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    assert world % num_stages == 0, f"{world} ranks in groups of {num_stages}"
    own = None
    for first in range(0, world, num_stages):
        handle = distributed.new_group(list(range(first, first + num_stages)), timeout=timedelta(seconds=TIMEOUT_S))
        own = handle if first <= rank < first + num_stages else own
    distributed.barrier(group=own)
    return StageGroup(num_stages, rank % num_stages, rank, own)


@dataclass
class _Owned:
    """A micro-batch of this rank that is on its way through the stages."""

    source: object
    batch: object
    features: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Travelling:
    """Somebody's micro-batch at this stage: tokens [n, R + T, D], and the patches' places [n, T] for rotary positions."""

    tokens: Tensor
    ids: Tensor


class StreamedTeacher(FrozenTeacher):
    """This rank's stage of a teacher, with the interface of the replicated one. `stages`: blocks of each stage, from 0."""

    def __init__(self, *args, group: StageGroup, stages: list[range], **keys):
        super().__init__(*args, **keys)
        self.group, self.stages = group, stages
        # Taps of each stage, in the order in which it sends them home.
        self._taps_of = [[tap for tap in self.taps if split_tap(tap)[1] - 1 in blocks] for blocks in stages]

    def __str__(self) -> str:
        blocks = self.stages[self.group.stage]
        return f"{super().__str__()}, in {len(self.stages)} stages; this rank has stage {self.group.stage + 1}, blocks {blocks.start + 1}-{blocks.stop}"

    def probe(self) -> Probe:
        """Features of the fixed input at every block of every stage. Collective in the group."""
        first = self.group.rank - self.group.stage
        blocks = [
            _SharedBlock(block, mine=stage == self.group.stage, source=first + stage, group=self.group.handle)
            for stage, numbers in enumerate(self.stages) for block in [self.vit.blocks[number] for number in numbers]
        ]  # fmt: skip
        return probe(self.vit, blocks)

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        """(micro-batch, masked batch) in, the same with its features out, in order, P later. Collective in the group.

        Every rank of a group must bring equally many batches, as the data's order sees to.
        Raises RunFailed where the group is lost.
        """
        clock = _Clock(self)
        for source, batch in batches:
            yield from clock.tick(_Owned(source, batch))
        while clock.owned:
            yield from clock.tick(None)


class _SharedBlock(nn.Module):
    """A block of one stage that answers on every rank of the group."""

    def __init__(self, block: nn.Module, *, mine: bool, source: int, group: distributed.ProcessGroup):
        super().__init__()
        self.block, self.source, self.group = block if mine else None, source, group

    def forward(self, tokens: Tensor, **keys) -> Tensor:
        tokens = torch.empty_like(tokens) if self.block is None else self.block(tokens, **keys).contiguous()
        distributed.broadcast(tokens, src=self.source, group=self.group)
        return tokens


class _Clock:
    """One run through the data: what is under way between the stages."""

    def __init__(self, teacher: StreamedTeacher):
        self.teacher, self.group = teacher, teacher.group
        self.now = -1
        self.owned: deque[_Owned] = deque()  # the oldest first; the oldest is of batch `first`
        self.first = 0
        # What my stage computed in the last clock, by owner: to be sent on, and home.
        self.outputs: dict[int, _Travelling] = {}
        self.finished: dict[int, dict[str, Tensor]] = {}
        self.layout: _Layout | None = None

    def tick(self, owned: _Owned | None) -> Iterator[tuple]:
        """Send, receive, run my stage; then give out my oldest batch if its features are home."""
        self.now += 1
        mine = None
        if owned is not None:
            self.owned.append(owned)
            mine = self._embed(owned)
        arrived = self._exchange(mine)
        self._run(arrived)
        if self.now >= self.first + self.group.num_stages and self.owned:
            done = self.owned.popleft()
            self.first += 1
            yield done.source, done.batch, self.teacher.standardized({tap: done.features[tap] for tap in self.teacher.taps})

    @torch.no_grad()
    def _embed(self, owned: _Owned) -> _Travelling:
        patches, ids = self.teacher.inputs(owned.batch)
        tokens = self.teacher.vit.embed(self.teacher.view(patches), ids)
        if self.layout is None:
            self.layout = _Layout.of(self.teacher, tokens, ids, num_visible=owned.batch.ids_keep.shape[1])
        return _Travelling(tokens, ids)

    @torch.no_grad()
    def _run(self, arrived: dict[int, _Travelling]) -> None:
        teacher, stage = self.teacher, self.group.stage
        self.outputs, self.finished = {}, {}
        for owner, travelling in arrived.items():
            tokens, ids, tapped = travelling.tokens, travelling.ids, {}
            for number in teacher.stages[stage]:
                tokens = teacher.vit.run_block(teacher.vit.blocks[number], tokens, ids)
                tapped[f"block/{number + 1}"] = tokens
            self.outputs[owner] = _Travelling(tokens, ids)
            self.finished[owner] = {tap: teacher.select(tapped[tap], self.layout.num_visible) for tap in teacher._taps_of[stage]}

    def _exchange(self, mine: _Travelling | None) -> dict[int, _Travelling]:
        """Returns the micro-batches that my stage is to run on, by owner; features of mine that arrived are put by."""
        layout, group = self.layout, self.group
        sent = [self._pack(target, mine) for target in range(group.num_stages)]
        send = torch.cat(sent)
        sizes = [layout.size(source, group.stage) for source in range(group.num_stages)]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=send.device)
        try:
            distributed.all_to_all_single(received, send, sizes, [len(message) for message in sent], group=group.handle)
        except RuntimeError as error:
            where = f"rank {group.rank}, teacher stage {group.stage + 1} of {group.num_stages}, clock {self.now}"
            raise RunFailed(f"the teacher's stream broke at {where}: {str(error).splitlines()[0]}; a rank of its group is gone or stuck") from None
        arrived: dict[int, _Travelling] = {}
        for source, message in enumerate(received.split(sizes)):
            arrived |= self._unpack(source, message)
        return arrived

    def _pack(self, target: int, mine: _Travelling | None) -> Tensor:
        """My message to one stage of the group."""
        layout, stage = self.layout, self.group.stage
        message = torch.zeros(layout.size(stage, target), dtype=torch.uint8, device=layout.device)
        writer = _Cursor(message)
        forward = self.outputs if target == stage + 1 else {}
        counts = [0 if mine is None else len(mine.tokens), *(len(forward[owner].tokens) if owner in forward else 0 for owner in range(self.group.num_stages))]
        writer.write(torch.tensor([self.now, *counts], device=layout.device), layout.header)
        if target == 0:
            layout.write_travelling(writer, mine)
        if target == stage + 1:
            for owner in range(self.group.num_stages):
                layout.write_travelling(writer, forward.get(owner))
        for tap in self.teacher._taps_of[stage]:
            found = self.finished.get(target)
            writer.write(None if found is None else found[tap], layout.home)
        return message

    def _unpack(self, source: int, message: Tensor) -> dict[int, _Travelling]:
        """What stage `source` sent: work for my stage, and features of a batch of mine."""
        layout, stage, num_stages = self.layout, self.group.stage, self.group.num_stages
        reader = _Cursor(message)
        clock, mine, *counts = reader.read(torch.int64, (2 + num_stages,), layout.header).tolist()
        if clock != self.now:
            raise RunFailed(f"the teacher's stream is out of step: rank {self.group.rank} is at clock {self.now}, stage {source + 1} of its group at {clock}")
        work = {}
        if stage == 0:
            work[source] = layout.read_travelling(reader, mine)
        if stage == source + 1:
            work |= {owner: layout.read_travelling(reader, counts[owner]) for owner in range(num_stages)}
        # Batch k passed stage s at clock k + s, and came home with the next exchange.
        index = self.now - source - 1 - self.first
        for tap in self.teacher._taps_of[source]:
            if 0 <= index < len(self.owned):
                owned = self.owned[index]
                owned.features[tap] = reader.read(layout.dtype, (len(owned.batch.ids_keep), *layout.home_shape), layout.home).clone()
            else:
                reader.skip(layout.home)
        return {owner: travelling for owner, travelling in work.items() if travelling is not None}


@dataclass(frozen=True)
class _Layout:
    """How long each message between two stages is, in bytes: the same at every clock of a run.

    micro_batch: images of the first batch; no later one may have more
    """

    taps_of: tuple[int, ...]
    micro_batch: int
    tokens_shape: tuple[int, int]
    num_ids: int
    num_visible: int
    home_shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, teacher: StreamedTeacher, tokens: Tensor, ids: Tensor, *, num_visible: int) -> _Layout:
        home = teacher.select(tokens[:1], num_visible).shape[1:]
        return cls(tuple(map(len, teacher._taps_of)), len(tokens), tuple(tokens.shape[1:]), ids.shape[1], num_visible, tuple(home), tokens.dtype, tokens.device)

    @property
    def header(self) -> int:
        return _aligned(8 * (2 + len(self.taps_of)))

    @property
    def tokens(self) -> int:
        return _aligned(self.micro_batch * self.tokens_shape[0] * self.tokens_shape[1] * self.dtype.itemsize)

    @property
    def ids(self) -> int:
        return _aligned(self.micro_batch * self.num_ids * 8)

    @property
    def home(self) -> int:
        return _aligned(self.micro_batch * self.home_shape[0] * self.home_shape[1] * self.dtype.itemsize)

    def size(self, source: int, target: int) -> int:
        travelling = (target == 0) + len(self.taps_of) * (target == source + 1)
        return self.header + travelling * (self.tokens + self.ids) + self.taps_of[source] * self.home

    def write_travelling(self, writer: _Cursor, travelling: _Travelling | None) -> None:
        writer.write(None if travelling is None else travelling.tokens, self.tokens)
        writer.write(None if travelling is None else travelling.ids, self.ids)

    def read_travelling(self, reader: _Cursor, count: int) -> _Travelling | None:
        tokens = reader.read(self.dtype, (count, *self.tokens_shape), self.tokens)
        ids = reader.read(torch.int64, (count, self.num_ids), self.ids)
        return _Travelling(tokens, ids) if count else None


class _Cursor:
    """Tensors one after the other in a message of bytes, each in a part of fixed size."""

    def __init__(self, message: Tensor):
        self.message, self.place = message, 0

    def write(self, tensor: Tensor | None, size: int) -> None:
        if tensor is not None:
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            assert len(flat) <= size, "a later micro-batch is larger than the first"
            self.message[self.place : self.place + len(flat)] = flat
        self.place += size

    def read(self, dtype: torch.dtype, shape: tuple[int, ...], size: int) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        part = self.message[self.place : self.place + count]
        self.place += size
        return part.view(dtype).view(shape)

    def skip(self, size: int) -> None:
        self.place += size


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
