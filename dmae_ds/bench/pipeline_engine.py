"""The rival of `bench stream`: the same blocks under DeepSpeed's own PipelineModule and PipelineEngine.eval_batch.

Its inputs are read on the first stage alone and its outputs come out of the last, so every rank's tokens are gathered
there and scattered home again, as a student beside it would need. Its default axes do not put
a pipeline's stages on consecutive ranks, so the topology is given.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from dmae_ds.distributed.deepspeed_import import import_deepspeed
from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher.pipeline import StageGroup


class EvalBatch:
    """This rank's stage of the blocks of `vit`, which must be a plain one; afterwards `vit` holds this stage's alone. Collective."""

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
        own = set(map(id, module.modules()))
        for block in vit.blocks:
            if id(block) not in own:
                block.to("meta")

    @torch.no_grad()
    def features(self, tokens: list[Tensor]) -> list[Tensor]:
        """This rank's embedded micro-batches [N, 1 + K, D], equally many on every rank -> the last block's outputs. Collective."""
        from deepspeed.runtime.pipe import p2p

        p2p.init_process_groups(
            self.engine.grid
        )  # a global of DeepSpeed's: with two engines the last one's, and the first hangs
        mine = torch.stack(tokens)
        group, is_first, is_last = (
            self.group,
            self.group.stage == 0,
            self.group.stage == self.group.num_stages - 1,
        )
        gathered = [torch.empty_like(mine) for _ in range(group.num_stages)] if is_first else None
        distributed.gather(mine, gathered, dst=self.first, group=group.handle)
        flat = [(batch, batch) for owner in gathered for batch in owner] if is_first else []
        count = group.num_stages * len(tokens)
        # Only its first stage looks at the data; the last one asks for labels, which nothing here has.
        data = iter(flat) if is_first else iter([(mine[0], mine[0])] * count)
        outputs = self.engine.eval_batch(
            data, compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=count
        )
        home = torch.empty_like(mine)
        scattered = list(torch.stack(list(outputs)).split(len(tokens))) if is_last else None
        distributed.scatter(home, scattered, src=self.first + group.num_stages - 1, group=group.handle)
        return list(home)
