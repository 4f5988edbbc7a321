"""A teacher spread over all ranks by DeepSpeed's ZeRO-3: every rank keeps a share of every block, and fetches a block to run it.

For teachers that fit nowhere else: it needs the least memory and the most traffic (all the blocks' bytes, every micro-batch,
with nothing to hide behind). It has no engine, whose hooks and prefetching would meet the student's: parameters are
partitioned by `deepspeed.zero.Init` and fetched by `GatheredParameters`, both on the world's group, from the host thread
that also issues the student's collectives, so their order is the same on every rank. Features are those of the replicated
teacher up to rounding: fetched weights lie elsewhere in memory, by which matrix products choose their kernels.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dmae_ds.distributed import collectives
from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.teacher.fill import move_buffers
from dmae_ds.teacher.frozen import FrozenTeacher
from dmae_ds.teacher.identity import Probe, is_pristine, probe
from dmae_ds.weights.named import Weights


class ShardedTeacher(FrozenTeacher):
    """The interface of the replicated teacher. Its `vit` holds the embedding; the blocks stay on the meta device there.

    weights: checked against the network already; rank 0 alone reads the blocks
    """

    without_gradients = (
        torch.no_grad
    )  # DeepSpeed's fetched weights outlive a call, and would be inference mode's for ever

    def __init__(self, *args, weights: Weights, dtype: torch.dtype, device: torch.device, **keys):
        super().__init__(*args, **keys)
        self._weights, self._dtype, self._device = weights, dtype, device
        self.blocks: list[_Fetched] = []

    def __str__(self) -> str:
        return f"{super().__str__()}, spread over {collectives.world_size()} ranks by ZeRO-3"

    def spread(self) -> None:
        """Read block by block on rank 0 and leave every rank its share: the peak is the share and one block. Collective."""
        deepspeed = import_deepspeed(self._device)
        deepspeed.init_distributed(dist_init_required=False)
        for number, meta in enumerate(self.vit.blocks):
            block = copy.deepcopy(meta)
            tensors = collectives.raise_on_all_ranks(lambda: self._read(number, block))
            block.load_state_dict(tensors, assign=True)
            move_buffers(block, self._dtype, self._device)
            block.eval().requires_grad_(False)
            pristine = is_pristine(block) if collectives.is_main() else False
            deepspeed.zero.Init(
                module=block,
                dtype=self._dtype,
                config_dict_or_path={
                    "zero_optimization": {"stage": 3},
                    "train_batch_size": collectives.world_size(),
                },
            )
            self.blocks.append(
                _Fetched(block, collectives.broadcast_from_main(pristine), deepspeed.zero.GatheredParameters)
            )

    def _read(self, number: int, block: nn.Module) -> dict[str, Tensor]:
        names = list(block.state_dict())
        if not collectives.is_main():  # filled by the broadcast
            return {
                name: torch.empty(tensor.shape, dtype=self._dtype, device=self._device)
                for name, tensor in block.state_dict().items()
            }
        return {
            name: self._weights[f"blocks.{number}.{name}"].to(device=self._device, dtype=self._dtype)
            for name in names
        }

    def run(self, patches: Tensor, ids: Tensor) -> dict[int, Tensor]:
        tokens, tapped = self.vit.embed(patches, ids), {}
        for number, block in enumerate(self.blocks, start=1):
            tokens = self.vit.run_block(block, tokens, ids)
            tapped[number] = tokens
        return {number: tapped[number] for number in self.tapped}

    def probe(self) -> Probe:
        """Collective: every rank fetches every block."""
        return Probe(probe(self.vit, self.blocks).features, all(block.pristine for block in self.blocks))


class _Fetched(nn.Module):
    """A block whose weights are whole while it runs. It is no child of this module: nobody is to see its empty parameters."""

    def __init__(self, block: nn.Module, pristine: bool, gathered):
        super().__init__()
        self._block, self.pristine, self._gathered = (block,), pristine, gathered

    def forward(self, tokens: Tensor, **keys) -> Tensor:
        (block,) = self._block
        with self._gathered(list(block.parameters())):
            return block(tokens, **keys)
