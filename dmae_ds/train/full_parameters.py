"""Full fp32 weights under ZeRO, gathered from all ranks a bucket of parameters at a time.

DeepSpeed's own functions gather one parameter a call and wait for the whole device in each; on a GPU these
launch one collective a bucket and wait for nothing.
"""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor, distributed, nn

BUCKET = 2**25  # entries of one collective, 128 MiB
Named = list[tuple[str, nn.Parameter]]


def full_parameters(named: Named, *, stage: int, has_masters: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full fp32 weight) of an engine's parameters. Collective; each may only be read.

    stage: of ZeRO, without offload to NVMe
    has_masters: whether the parameters are roundings of fp32 weights that the optimizer has
    """
    is_reduced = has_masters and any(hasattr(parameter, "_hp_mapping") for _, parameter in named)
    if stage < 3 and not is_reduced:
        yield from ((name, parameter.detach().float()) for name, parameter in named)
        return
    for bucket in _buckets(named):
        yield from (_gather_shares if stage == 3 else _sum_fragments)(bucket)


def _buckets(named: Named) -> Iterator[Named]:
    bucket, entries = [], 0
    for name, parameter in named:
        size = _numel(parameter)
        if bucket and entries + size > BUCKET:
            yield bucket
            bucket, entries = [], 0
        bucket.append((name, parameter))
        entries += size
    if bucket:
        yield bucket


def _numel(parameter: nn.Parameter) -> int:
    """Number of a parameter's entries, also while ZeRO-3 has only its share here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def _gather_shares(bucket: Named) -> Iterator[tuple[str, Tensor]]:
    """ZeRO-3: each rank has an equal piece of each parameter, the last one padded."""
    first = bucket[0][1]
    shares = [_share(parameter) for _, parameter in bucket]
    own = torch.cat(shares).to(first.device, non_blocking=True)
    # [ranks, the pieces of one rank]
    gathered = own.new_empty(distributed.get_world_size(first.ds_process_group), len(own))
    distributed.all_gather_into_tensor(gathered.view(-1), own, group=first.ds_process_group)
    columns = gathered.split([len(share) for share in shares], dim=1)
    for (name, parameter), pieces in zip(bucket, columns, strict=True):
        yield name, pieces.reshape(-1)[: parameter.ds_numel].view(parameter.ds_shape)


def _share(parameter: nn.Parameter) -> Tensor:
    """This rank's fp32 piece of a parameter, flat."""
    if not parameter.requires_grad:
        return parameter.ds_tensor.detach().float()
    optimizer = parameter._z3_optimizer
    group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    return optimizer.fp32_partitioned_groups_flat[group].detach().narrow(0, start, size)


def _sum_fragments(bucket: Named) -> Iterator[tuple[str, Tensor]]:
    """ZeRO-1 and 2: a rank has the fp32 weights of a range of each group's entries, the other ranks zeros."""
    sizes = [parameter.numel() for _, parameter in bucket]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=bucket[0][1].device)
    wholes, group = flat.split(sizes), None
    for (_, parameter), whole in zip(bucket, wholes, strict=True):
        if not hasattr(parameter, "_hp_mapping"):  # is not trained
            continue
        group = parameter._dp_group
        if parameter._hp_mapping is not None:
            place = parameter._hp_mapping.lp_fragment_address
            fragment = parameter._hp_mapping.get_hp_fragment().detach()
            whole.narrow(0, place.start, place.numel).copy_(fragment, non_blocking=True)
    if group is not None:
        distributed.all_reduce(flat, group=group)
    for (name, parameter), whole in zip(bucket, wholes, strict=True):
        yield name, whole.view(parameter.shape) if hasattr(parameter, "_hp_mapping") else parameter.float()
