"""A teacher's blocks under DeepSpeed's own PipelineEngine.eval_batch, for comparison in `bench stream`.

DeepSpeed reads inputs on the first stage and returns outputs on the last, so all ranks' tokens are gathered
on the first and scattered from the last, as a student on every rank needs. Its default axes do not put a
pipeline's stages on consecutive ranks, so the topology is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher.pipeline import StageGroup


class EvalBatch:
    """This rank's stage of the blocks of `vit`, a plain ViT that keeps only these blocks. Collective."""

    def __init__(self, vit: MaskedViT, group: StageGroup):
        deepspeed = import_deepspeed(vit.patch_embed.proj.weight.device)
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.topology import ProcessTopology

        deepspeed.init_distributed(dist_backend=distributed.get_backend(), dist_init_required=False)
        self.group, self.first = group, group.rank - group.stage
        topology = ProcessTopology(
            ["data", "pipe"], [distributed.get_world_size() // group.num_stages, group.num_stages]
        )
        module = PipelineModule(list(vit.blocks), topology=topology, partition_method="uniform", loss_fn=None)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": group.num_stages,
            "zero_optimization": {"stage": 0},
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
        kept = set(map(id, module.modules()))
        for block in vit.blocks:
            if id(block) not in kept:
                block.to("meta")

    @torch.no_grad()
    def features(self, tokens: list[Tensor]) -> list[Tensor]:
        """Compute the last block's outputs for embedded micro-batches, each [N, 1 + K, D]. Collective.

        All ranks must give the same number of micro-batches.
        """
        from deepspeed.runtime.pipe import p2p

        # A global of DeepSpeed's: with two engines it is the last one's, and the first would hang.
        p2p.init_process_groups(self.engine.grid)
        group, mine = self.group, torch.stack(tokens)
        is_first, is_last = group.stage == 0, group.stage == group.num_stages - 1
        gathered = [torch.empty_like(mine) for _ in range(group.num_stages)] if is_first else None
        distributed.gather(mine, gathered, dst=self.first, group=group.handle)
        flat = [(batch, batch) for owner in gathered for batch in owner] if is_first else []
        count = group.num_stages * len(tokens)
        # Only the first stage uses the data; the others iterate over it, the last one for labels.
        data = iter(flat) if is_first else iter([(mine[0], mine[0])] * count)
        outputs = self.engine.eval_batch(
            data, compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=count
        )
        outputs_here = torch.empty_like(mine)
        scattered = list(torch.stack(list(outputs)).split(len(tokens))) if is_last else None
        distributed.scatter(
            outputs_here, scattered, src=self.first + group.num_stages - 1, group=group.handle
        )
        return list(outputs_here)
