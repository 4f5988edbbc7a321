"""Started by test_collectives.py on two ranks: collectives of objectives, compared with one process."""

import torch

from dmae_ds.distributed import collectives, process_group
from dmae_ds.distributed.world import whole_lines, world_from_env

whole_lines()
world = world_from_env()
process_group.start(world)
shares = torch.arange(12, dtype=torch.float64).reshape(2, 3, 2) ** 2  # [ranks, rows, columns]
own = shares[world.rank].clone().requires_grad_()

gathered = collectives.gather_rows(own)
assert torch.equal(gathered, shares.flatten(0, 1)) and not gathered.requires_grad
averaged = collectives.mean_over_ranks(own)
assert torch.equal(averaged, shares.mean(dim=0)) and not averaged.requires_grad

# L = mean over ranks of (rank + 1) * sum(mean^3). The gradient that a rank gets back, averaged over ranks as
# DeepSpeed does, is dL / dx.
whole = shares.clone().requires_grad_()
expected = sum((rank + 1) * (whole.mean(dim=0) ** 3).sum() for rank in range(2)) / 2
expected.backward()
mean = collectives.mean_over_ranks_with_gradient(own)
assert torch.equal(mean, shares.mean(dim=0))
((world.rank + 1) * (mean**3).sum()).backward()
torch.testing.assert_close(own.grad / 2, whole.grad[world.rank])

with collectives.alone():
    assert (collectives.world_size(), collectives.rank()) == (1, 0)
    assert torch.equal(collectives.gather_rows(own), own)
    assert collectives.mean_over_ranks_with_gradient(own) is own
assert (collectives.world_size(), collectives.rank()) == (2, world.rank)
print("checked", world.rank, flush=True)
process_group.stop()
