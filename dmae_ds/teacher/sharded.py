"""Shard a teacher over all ranks by DeepSpeed's ZeRO-3: a rank keeps a share of each block.

For teachers that fit nowhere else: it needs the least memory and the most traffic (all bytes of the blocks
for every micro-batch, with no work to hide them). It has no engine, whose hooks and prefetching would
interfere with the student's. Parameters are partitioned by `deepspeed.zero.Init` and fetched by
`GatheredParameters`, both on the world's group, from the host thread that also issues the student's
collectives, so their order is the same on every rank. Features are those of the replicated teacher up to
rounding: fetched weights have other addresses, by which matrix products choose their kernels.
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
    """A teacher sharded over all ranks, with the interface of the replicated one.

    Its `vit` holds the embedding; the blocks stay on the meta device there.
    weights: already checked against the network; only rank 0 reads the blocks
    """

    # DeepSpeed's fetched weights outlive a call, and would stay inference tensors for ever.
    without_gradients = torch.no_grad

    def __init__(self, *args, weights: Weights, dtype: torch.dtype, device: torch.device, **kwargs):
        super().__init__(*args, **kwargs)
        self._weights, self._dtype, self._device = weights, dtype, device
        self.blocks: list[_Fetched] = []

    def __str__(self) -> str:
        return f"{super().__str__()}, spread over {collectives.world_size()} ranks by ZeRO-3"

    def spread(self) -> None:
        """Read each block on rank 0 and leave every rank its share. Collective.

        The peak of memory is the share and one block.
        """
        deepspeed = import_deepspeed(self._device)
        deepspeed.init_distributed(dist_init_required=False)
        config = {"zero_optimization": {"stage": 3}, "train_batch_size": collectives.world_size()}
        for number in range(len(self.vit.blocks)):
            block = self._read_block(number)
            pristine = is_pristine(block) if collectives.is_main() else False
            deepspeed.zero.Init(module=block, dtype=self._dtype, config_dict_or_path=config)
            pristine = collectives.broadcast_from_main(pristine)
            self.blocks.append(_Fetched(block, pristine, deepspeed.zero.GatheredParameters))

    def _read_block(self, number: int) -> nn.Module:
        block = copy.deepcopy(self.vit.blocks[number])
        tensors = collectives.raise_on_all_ranks(lambda: self._read_tensors(number, block))
        block.load_state_dict(tensors, assign=True)
        move_buffers(block, self._dtype, self._device)
        return block.eval().requires_grad_(False)

    def _read_tensors(self, number: int, block: nn.Module) -> dict[str, Tensor]:
        """One block's tensors on rank 0; empty ones elsewhere, which DeepSpeed's broadcast fills."""
        kwargs = {"dtype": self._dtype, "device": self._device}
        if not collectives.is_main():
            return {name: torch.empty(tensor.shape, **kwargs) for name, tensor in block.state_dict().items()}
        return {name: self._weights[f"blocks.{number}.{name}"].to(**kwargs) for name in block.state_dict()}

    def run(self, patches: Tensor, ids: Tensor) -> dict[int, Tensor]:
        tokens, tapped = self.vit.embed(patches, ids), {}
        for number, block in enumerate(self.blocks, start=1):
            tokens = self.vit.run_block(block, tokens, ids)
            tapped[number] = tokens
        return {number: tapped[number] for number in self.tapped}

    def probe(self) -> Probe:
        """Features of the fixed input, at every block. Collective: every rank fetches every block."""
        return Probe(probe(self.vit, self.blocks).features, all(block.pristine for block in self.blocks))


class _Fetched(nn.Module):
    """A block whose weights are whole while it runs.

    The block is not a child of this module, so that nothing finds its empty parameters.
    """

    def __init__(self, block: nn.Module, pristine: bool, gathered):
        super().__init__()
        self._block, self.pristine, self._gathered = (block,), pristine, gathered

    def forward(self, tokens: Tensor, **kwargs) -> Tensor:
        (block,) = self._block
        with self._gathered(list(block.parameters())):
            return block(tokens, **kwargs)
