"""Shard a teacher over all ranks as ZeRO-3 does: a rank keeps a share of each block.

For teachers that fit nowhere else: it needs little memory and the most traffic, all bytes of the blocks for
every micro-batch. A block's tensors are one flat tensor, cut into equal shares; ONE all-gather makes it whole
when the block is to run, and the next block's travels meanwhile. Two blocks are whole at a time, in two
buffers that all blocks share. On NCCL the host waits for nothing: a gather begins behind the work that was
queued before it, so behind the block that used its buffer last, and a block's work is queued behind its
gather.

Gathers are on the world's group, from the host thread that also issues the student's collectives, so their
order is the same on every rank; each is waited for before the features are used, so none is in flight when
the student's begin. Each tensor lies at a multiple of 64 bytes, as by itself: matrix products choose their
kernels by that, and features are those of the replicated teacher.
"""

from __future__ import annotations

import copy
from math import ceil, prod

import torch
from torch import Tensor, distributed, nn

from dmae_ds.distributed import collectives
from dmae_ds.teacher.fill import move_buffers
from dmae_ds.teacher.frozen import FrozenTeacher
from dmae_ds.teacher.identity import Probe, is_pristine, probe
from dmae_ds.weights.named import Weights

ALIGNMENT = 64  # bytes, as torch allocates on CPUs


class ShardedTeacher(FrozenTeacher):
    """A teacher sharded over all ranks, with the interface of the replicated one.

    Its `vit` holds the embedding; the blocks stay on the meta device there.
    weights: already checked against the network; only rank 0 reads the blocks
    """

    def __init__(self, *args, weights: Weights, dtype: torch.dtype, device: torch.device, **kwargs):
        super().__init__(*args, **kwargs)
        self._weights, self._dtype, self._device = weights, dtype, device
        self.blocks: list[_Fetched] = []

    def __str__(self) -> str:
        return f"{super().__str__()}, spread over {collectives.world_size()} ranks as by ZeRO-3"

    def spread(self) -> None:
        """Read each block on rank 0 and leave every rank its share. Collective.

        The peak of memory is the share and two blocks; on rank 0, a third one.
        """
        num_ranks = collectives.world_size()
        places = [_Places.of(block, self._dtype, num_ranks) for block in self.vit.blocks]
        largest = max(place.size for place in places)
        buffers = [
            torch.zeros(largest, dtype=self._dtype, device=self._device) for _ in range(min(2, len(places)))
        ]
        for number, place in enumerate(places):
            block = copy.deepcopy(self.vit.blocks[number])
            whole = buffers[number % len(buffers)][: place.size]
            block.load_state_dict(place.views(whole), assign=True)
            move_buffers(block, self._dtype, self._device)
            block.eval().requires_grad_(False)
            collectives.raise_on_all_ranks(lambda block=block, number=number: self._read(number, block))
            pristine = is_pristine(block) if collectives.is_main() else False
            pristine = collectives.broadcast_from_main(pristine)
            share = torch.empty(place.size // num_ranks, dtype=self._dtype, device=self._device)
            shares = list(_bytes(whole).split(share.nbytes)) if collectives.is_main() else None
            distributed.scatter(_bytes(share), shares, src=0)
            self.blocks.append(_Fetched(block, share, whole, pristine))

    def _read(self, number: int, block: nn.Module) -> None:
        """Read a block's tensors on rank 0 into their places."""
        if not collectives.is_main():
            return
        with torch.no_grad():
            for name, tensor in block.state_dict().items():
                tensor.copy_(self._weights[f"blocks.{number}.{name}"])

    def run(self, patches: Tensor, ids: Tensor) -> dict[str, Tensor]:
        self.blocks[0].fetch()
        return super().run(patches, ids)

    def use_block(self, number: int) -> nn.Module:
        """The block of this number, whole; the next one is on its way. Collective."""
        if number < len(self.blocks):
            self.blocks[number].fetch()
        return self.blocks[number - 1].wait()

    def probe(self) -> Probe:
        """Features of the fixed input, at every block. Collective: every rank fetches every block."""
        return Probe(probe(self.vit, self.blocks).features, all(block.pristine for block in self.blocks))


class _Places:
    """Where a block's tensors lie in its flat tensor: {name: (start, shape)}, and the flat tensor's size.

    Counted in entries. The size is a multiple of the ranks.
    """

    def __init__(self, places: dict[str, tuple[int, torch.Size]], size: int):
        self.places, self.size = places, size

    @classmethod
    def of(cls, block: nn.Module, dtype: torch.dtype, num_ranks: int) -> _Places:
        unit = ALIGNMENT // dtype.itemsize
        places, end = {}, 0
        for name, tensor in block.state_dict().items():
            places[name] = (end, tensor.shape)
            end += ceil(tensor.numel() / unit) * unit
        return cls(places, ceil(end / (unit * num_ranks)) * unit * num_ranks)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The block's tensors as views of the flat one."""
        return {
            name: flat[start : start + prod(shape)].view(shape)
            for name, (start, shape) in self.places.items()
        }


class _Fetched(nn.Module):
    """A block whose weights are whole from `fetch` until the block after the next one is fetched.

    The block is not a child of this module, so that nothing finds its parameters.
    share: this rank's part [size / ranks]; whole: [size], the buffer that the block's tensors are views of
    """

    def __init__(self, block: nn.Module, share: Tensor, whole: Tensor, pristine: bool):
        super().__init__()
        self._block, self.share, self._whole, self.pristine = (block,), share, whole, pristine
        self._work: distributed.Work | None = None

    def fetch(self) -> None:
        """Start to gather the weights. Collective."""
        self._work = distributed.all_gather_into_tensor(
            _bytes(self._whole), _bytes(self.share), async_op=True
        )

    def wait(self) -> nn.Module:
        """Wait for the weights and return the block with them."""
        self._work.wait()
        self._work = None
        (block,) = self._block
        return block

    def forward(self, tokens: Tensor, **kwargs) -> Tensor:
        self.fetch()
        return self.wait()(tokens, **kwargs)


def _bytes(flat: Tensor) -> Tensor:
    """The same memory, for backends that know few dtypes."""
    return flat.view(torch.uint8)
