"""Collectives of the trainer, and which rank this is in the process group. torch is imported late."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Iterator, TypeVar

from dmae_ds.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_alone = False  # see alone()


def rank() -> int:
    """This process's number in the process group; 0 where there is none."""
    from torch import distributed

    return 0 if _alone or not distributed.is_initialized() else distributed.get_rank()


def world_size() -> int:
    """Ranks in the process group; 1 where there is none."""
    from torch import distributed

    return 1 if _alone or not distributed.is_initialized() else distributed.get_world_size()


def is_main() -> bool:
    """Whether this is rank 0 of the process group."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """As if this rank were the only one: for networks that one rank looks at by itself, on fake tensors."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def barrier() -> None:
    """Wait for every rank."""
    from torch import distributed

    distributed.barrier()


def broadcast_from_main(value: T) -> T:
    """Rank 0's answer, on every rank; the others' is ignored."""
    from torch import distributed

    answer = [value]
    distributed.broadcast_object_list(answer, src=0)
    return answer[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's plain value, in the order of ranks. For rare, small things."""
    from torch import distributed

    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def raise_on_all_ranks(step: Callable[[], T]) -> T:
    """Do something that may meet a user's mistake, perhaps on one rank alone; then every rank raises the same UserError.

    Collective: every rank must call it.
    """
    result, message = None, None
    try:
        result = step()
    except UserError as error:
        message = str(error)
    messages = gather_objects((socket.gethostname(), message))
    failed = [rank for rank, (_, found) in enumerate(messages) if found is not None]
    if not failed:
        return result
    host, first = messages[failed[0]]
    error = UserError(
        first if len(failed) == len(messages) else f"{first} (met by rank {failed[0]} on {host})"
    )
    error.on_every_rank = True
    raise error


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, on every rank, without gradient."""
    from torch import distributed

    total = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks, the same on every rank, without gradient; NaNs stay NaNs."""
    return sum_over_ranks(values) / world_size()


def mean_over_ranks_with_gradient(values: torch.Tensor) -> torch.Tensor:
    """`mean_over_ranks` that gradients pass: each rank gets back the mean of all ranks' gradients. Collective, also in backward.

    With gradients of parameters averaged over ranks, as DeepSpeed does, that is the gradient of the mean of all ranks' losses.
    Alone, the tensor itself.
    """
    if world_size() == 1:
        return values
    import torch

    class MeanOverRanks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values: torch.Tensor) -> torch.Tensor:
            return mean_over_ranks(values)

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
            return mean_over_ranks(gradient.contiguous())

    return MeanOverRanks.apply(values)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """[n, ...] of every rank -> [ranks * n, ...] on every rank, in the order of ranks, without gradient. Alone, the tensor itself.

    n must be the same on every rank.
    """
    if world_size() == 1:
        return rows.detach()
    import torch
    from torch import distributed

    found = [
        torch.empty_like(rows, requires_grad=False, memory_format=torch.contiguous_format)
        for _ in range(world_size())
    ]
    distributed.all_gather(found, rows.detach().contiguous())
    return torch.cat(found)
