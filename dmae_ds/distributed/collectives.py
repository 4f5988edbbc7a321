"""Collectives of the trainer, and this process's rank in the process group. torch is imported late."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Iterator, TypeVar

from dmae_ds.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_alone = False  # set by `alone`


def rank() -> int:
    """This process's rank in the process group; 0 where there is no group."""
    from torch import distributed

    return 0 if _alone or not distributed.is_initialized() else distributed.get_rank()


def world_size() -> int:
    """Number of ranks in the process group; 1 where there is no group."""
    from torch import distributed

    return 1 if _alone or not distributed.is_initialized() else distributed.get_world_size()


def is_main() -> bool:
    """Whether this is rank 0 of the process group."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Let this rank act as the only one in the block: for networks on fake tensors, which one rank builds."""
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
    """Return rank 0's value on every rank; the values of other ranks are ignored."""
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's plain value, in the order of ranks. For rare, small things."""
    from torch import distributed

    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def raise_on_all_ranks(step: Callable[[], T]) -> T:
    """Call `step`; if it raised UserError on any rank, raise the same UserError on every rank.

    Collective: every rank must call it.
    """
    result, message = None, None
    try:
        result = step()
    except UserError as error:
        message = str(error)
    outcomes = gather_objects((socket.gethostname(), message))
    failed = [rank for rank, (_, text) in enumerate(outcomes) if text is not None]
    if not failed:
        return result
    host, first = outcomes[failed[0]]
    if len(failed) < len(outcomes):
        first = f"{first} (met by rank {failed[0]} on {host})"
    error = UserError(first)
    error.on_every_rank = True
    raise error


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks, on every rank, without gradient."""
    from torch import distributed

    total = values.detach().clone()
    if world_size() > 1:
        distributed.all_reduce(total)
    return total


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over all ranks, on every rank, without gradient; NaNs stay NaNs."""
    return sum_over_ranks(values) / world_size()


def mean_over_ranks_with_gradient(values: torch.Tensor) -> torch.Tensor:
    """Return `mean_over_ranks` with a gradient: each rank gets back the mean of all ranks' gradients.

    With gradients of parameters averaged over ranks, as DeepSpeed does, that is the gradient of the mean of
    all ranks' losses. With one rank, the tensor itself. Collective, also in the backward pass.
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
    """Concatenate the rows [n, ...] of all ranks to [ranks * n, ...], without gradient.

    The order is that of the ranks; n must be the same on every rank. With one rank, the tensor itself.
    """
    if world_size() == 1:
        return rows.detach()
    import torch
    from torch import distributed

    gathered = [
        torch.empty_like(rows, requires_grad=False, memory_format=torch.contiguous_format)
        for _ in range(world_size())
    ]
    distributed.all_gather(gathered, rows.detach().contiguous())
    return torch.cat(gathered)
