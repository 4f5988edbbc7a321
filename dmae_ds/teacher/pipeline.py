"""The teacher as a stream: P frozen stages on P consecutive ranks, all of them busy on every pipeline tick.

A frozen teacher needs nothing from the student, so it runs ahead. Every rank embeds its own visible tokens
(the embedding is small and replicated). On each tick a group does ONE all_to_all that carries everything: a
rank's embedded micro-batch to stage 0, its stage's outputs of the last tick to the next stage, and finished
features back to their owners. While the exchange is under way, the stage runs on what the previous exchange
brought. In steady state there is no bubble, a rank holds a P-th of the blocks and runs as many as a
replicated teacher would (stages.py), and features of batch k arrive on tick k + 2P. (Waiting for the exchange
first halves the look-ahead and was slower; BENCHMARKS.md has both.)

The ordering rule, for whoever extends this: from one host thread, every rank issues the exchange, its stage's
work and the student's collectives in this order, and waits for the exchange before the student's first
collective. Otherwise two communicators with operations in flight (the group's and ZeRO's) may wait for each
other on the device; NCCL guarantees no order across communicators. With one collective of fixed sizes a tick
nothing else has to be ordered, and nothing can deadlock. Never exchange from a hook or from another thread.
On NCCL the exchange runs on the group's own communicator and stream, `wait` is an event on the compute
stream, and the host reads only a message's header, one tick later, after another event.

Each owner's micro-batch is run by itself, at its own size: the result is bit-identical to the replicated
teacher's, and a smaller last batch is no special case. The stream is never saved: a resumed run fills it
again from the data's order.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Iterable, Iterator

import torch
from torch import Tensor, distributed, nn

from dmae_ds.distributed.process_group import ask_who_is_missing, reason_of, timeout
from dmae_ds.errors import RankLost
from dmae_ds.teacher.frozen import FrozenTeacher, split_tap
from dmae_ds.teacher.identity import Probe, probe
from dmae_ds.teacher.messages import Layout, StageInput
from dmae_ds.teacher.stages import held_blocks, route


@dataclass(frozen=True)
class StageGroup:
    """P consecutive ranks that together hold one teacher; `stage` is this rank's, from 0."""

    num_stages: int
    stage: int
    rank: int
    handle: distributed.ProcessGroup


def join_group(num_stages: int) -> StageGroup:
    """Make every group of the world, in the same order on every rank, and return this rank's. Collective.

    A barrier warms the group up.
    """
    world, rank = distributed.get_world_size(), distributed.get_rank()
    assert world % num_stages == 0, f"{world} ranks in groups of {num_stages}"
    mine = None
    for first in range(0, world, num_stages):
        handle = distributed.new_group(list(range(first, first + num_stages)), timeout=timeout())
        if first <= rank < first + num_stages:
            mine = handle
    distributed.barrier(group=mine)
    return StageGroup(num_stages, rank % num_stages, rank, mine)


class StreamedTeacher(FrozenTeacher):
    """This rank's stage of a teacher, with the interface of the replicated one.

    overlap: False waits for each exchange before the stage runs, with half the look-ahead; for the benchmark
    waited_s: seconds that this rank has waited for exchanges (on a GPU: that its host has)
    """

    def __init__(self, *args, group: StageGroup, overlap: bool = True, **kwargs):
        self.group, self.overlap = group, overlap
        self.waited_s = 0.0
        self.tick = -1
        super().__init__(*args, **kwargs)

    def choose(self, taps: tuple[str, ...]) -> None:
        super().choose(taps)
        stages = range(self.group.num_stages)
        # [owner][stage]
        self.routes = [route(self.vit.depth, len(stages), owner) for owner in stages]
        self.taps_of = tuple(
            tuple(
                tuple(tap for tap in self.encoder_taps if split_tap(tap)[1] - 1 in blocks)
                for blocks in stages
            )
            for stages in self.routes
        )

    def __str__(self) -> str:
        blocks = held_blocks(self.vit.depth, self.group.num_stages)[self.group.stage]
        stage = f"stage {self.group.stage + 1}, blocks {blocks.start + 1}-{blocks.stop}"
        return f"{super().__str__()}, in {self.group.num_stages} stages; this rank has {stage}"

    def where(self) -> str:
        """This rank's stage and tick for messages: "teacher stage 2 of 4, tick 17"."""
        return f"teacher stage {self.group.stage + 1} of {self.group.num_stages}, tick {self.tick}"

    def probe(self) -> Probe:
        """Features of the fixed input at every block of every stage. Collective in the group."""
        first = self.group.rank - self.group.stage
        blocks = [
            _SharedBlock(
                self.vit.blocks[number],
                mine=stage == self.group.stage,
                source=first + stage,
                group=self.group.handle,
            )
            for stage, numbers in enumerate(self.routes[0])
            for number in numbers
        ]
        return probe(self.vit, blocks)

    def stream(self, batches: Iterable) -> Iterator[tuple]:
        """Take (micro-batch, masked batch) and yield both with features, in order, 2P later.

        Collective in the group: every rank must bring equally many batches, as the data's order guarantees.
        Raises RunFailed where the group is lost.
        """
        run = _Stream(self)
        for source, batch in batches:
            yield from run.tick(_Owned(source, batch))
        while run.owned:
            yield from run.tick(None)


class _SharedBlock(nn.Module):
    """A block of one stage whose output every rank of the group gets."""

    def __init__(self, block: nn.Module, *, mine: bool, source: int, group: distributed.ProcessGroup):
        super().__init__()
        self.block, self.source, self.group = block if mine else None, source, group

    def forward(self, tokens: Tensor, **kwargs) -> Tensor:
        mine = self.block is not None
        tokens = self.block(tokens, **kwargs).contiguous() if mine else torch.empty_like(tokens)
        distributed.broadcast(tokens, src=self.source, group=self.group)
        return tokens


@dataclass
class _Owned:
    """A micro-batch of this rank that is on its way through the stages."""

    source: object
    batch: object
    features: dict[str, Tensor] = field(default_factory=dict)


class _Stream:
    """One run through the data: batches and messages between the stages."""

    def __init__(self, teacher: StreamedTeacher):
        self.teacher, self.group = teacher, teacher.group
        self.lag = 2 if teacher.overlap else 1  # ticks from one stage to the next
        self.now = -1
        self.owned: deque[_Owned] = deque()  # the oldest first; the oldest is of batch `first`
        self.first = 0
        # Results of this rank's stage on the last tick, by owner: to the next stage, and back to the owner.
        self.outputs: dict[int, StageInput] = {}
        self.finished: dict[int, dict[str, Tensor]] = {}
        self.arrived: _Arrived | None = None
        self.layout: Layout | None = None

    def tick(self, owned: _Owned | None) -> Iterator[tuple]:
        """Exchange messages, run this rank's stage, and yield its oldest batch if its features are there."""
        self.now += 1
        self.teacher.tick = self.now
        mine = None
        if owned is not None:
            self.owned.append(owned)
            mine = self._embed(owned)
        exchange = self._start(mine)
        if self.teacher.overlap:
            self._run(self.arrived)
            self.arrived = self._finish(exchange)
        else:
            self._run(self._finish(exchange))
        if self.now >= self.first + self.lag * self.group.num_stages:
            done = self.owned.popleft()
            self.first += 1
            yield done.source, done.batch, self.teacher.finish(done.features, done.batch)

    def _embed(self, owned: _Owned) -> StageInput:
        teacher = self.teacher
        patches, ids = teacher.inputs(owned.batch)
        with torch.inference_mode():
            tokens = teacher.vit.embed(teacher.view(patches), ids)
        if self.layout is None:
            self._prepare(tokens, ids, num_home=teacher.num_home(owned.batch))
        return StageInput(tokens, ids)

    def _prepare(self, tokens: Tensor, ids: Tensor, *, num_home: int) -> None:
        """Prepare sizes and buffers that every tick uses again.

        There are two to receive into: one is read while the next exchange fills the other.
        """
        self.num_home = num_home
        home_tokens = self.teacher.select(tokens[:1], num_home).shape[1]
        self.layout = Layout(
            self.teacher.taps_of,
            len(tokens),
            tuple(tokens.shape[1:]),
            ids.shape[1],
            {tap: (home_tokens, self.teacher.home_width(tap)) for tap in self.teacher.encoder_taps},
            tokens.dtype,
        )
        stage, stages = self.group.stage, range(self.group.num_stages)
        self.send_sizes = [self.layout.size(stage, target) for target in stages]
        self.receive_sizes = [self.layout.size(source, stage) for source in stages]
        self.send = torch.empty(sum(self.send_sizes), dtype=torch.uint8, device=tokens.device)
        self.receive = [
            torch.empty(sum(self.receive_sizes), dtype=torch.uint8, device=tokens.device) for _ in range(2)
        ]

    @torch.inference_mode()
    def _run(self, arrived: _Arrived | None) -> None:
        teacher, stage = self.teacher, self.group.stage
        self.outputs, self.finished = {}, {}
        if arrived is None:
            return
        work = self.layout.read_work(arrived.received, arrived.headers(), target=stage, tick=arrived.tick)
        for owner, stage_input in work.items():
            blocks, ids = teacher.routes[owner][stage], stage_input.ids
            numbers = range(blocks.start + 1, blocks.stop + 1)
            tokens, tapped = teacher.run_blocks(numbers, stage_input.tokens, ids)
            self.outputs[owner] = StageInput(tokens, ids)
            self.finished[owner] = {
                tap: teacher.select(tapped[tap], self.num_home) for tap in teacher.taps_of[owner][stage]
            }

    def _start(self, mine: StageInput | None):
        """Write this rank's messages to all ranks and start the exchange."""
        for target, message in enumerate(self.send.split(self.send_sizes)):
            self.layout.write(
                message,
                source=self.group.stage,
                target=target,
                tick=self.now,
                mine=mine,
                outputs=self.outputs,
                home=self.finished.get(target, {}),
            )
        received = self.receive[self.now % 2]
        with _named(self.teacher):
            work = distributed.all_to_all_single(
                received,
                self.send,
                self.receive_sizes,
                self.send_sizes,
                group=self.group.handle,
                async_op=True,
            )
        return work, received

    def _finish(self, exchange) -> _Arrived:
        """Wait for the exchange and keep the features of this rank's own batches."""
        work, received = exchange
        since = time.perf_counter()
        with _named(self.teacher):
            work.wait()
        self.teacher.waited_s += time.perf_counter() - since
        for source in range(self.group.num_stages):
            # Batch k left stage s, and returned to its owner, with exchange k + lag * (s + 1).
            index = self.now - self.lag * (source + 1) - self.first
            if 0 <= index < len(self.owned):
                owned = self.owned[index]
                home = self.layout.read_home(
                    received, source=source, owner=self.group.stage, count=len(owned.batch.ids_keep)
                )
                owned.features |= {tap: tokens.clone() for tap, tokens in home.items()}
        return _Arrived(received, self.layout.headers(received, self.group.stage), self.now)


class _Arrived:
    """Messages of an exchange; headers are copied to the host, and nothing waits until they are read."""

    def __init__(self, received: Tensor, headers: Tensor, tick: int):
        self.received, self.tick = received, tick
        self._copied = None
        if headers.is_cuda:
            self._headers = torch.empty(headers.shape, dtype=headers.dtype, pin_memory=True)
            self._headers.copy_(headers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._headers = headers

    def headers(self) -> list[list[int]]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._headers.tolist()


@contextmanager
def _named(teacher: StreamedTeacher) -> Iterator[None]:
    """Turn an error of an exchange into RankLost, with rank, stage and tick."""
    try:
        yield
    except RuntimeError as error:
        ask_who_is_missing(error)
        where = f"rank {teacher.group.rank}, {teacher.where()}"
        raise RankLost(
            f"the teacher's stream failed at {where}: {reason_of(error)}; "
            "a rank of its group is gone or stuck"
        ) from None
