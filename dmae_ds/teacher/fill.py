"""Give a teacher on the meta device its tensors, read one by one from its file."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmae_ds.models.vit import MaskedViT
from dmae_ds.teacher.frozen import TeacherParts
from dmae_ds.teacher.top import Top
from dmae_ds.weights.fit import block_of, check_fit
from dmae_ds.weights.load import read_tensors
from dmae_ds.weights.metadata import check_own_metadata
from dmae_ds.weights.named import Weights


def fill(
    vit: MaskedViT,
    weights: Weights,
    *,
    whole_blocks: int,
    may_resize: bool,
    dtype: torch.dtype,
    device: torch.device,
    network: tuple[str, dict] | None = None,
    blocks: range | None = None,
    top: Top | None = None,
) -> TeacherParts:
    """Read a teacher's tensors from its file, put them in place, and describe what was built.

    blocks: counted from 0, those of one stage: the embedding and these blocks alone are read; None: all
    network: (name, overrides) of the recipe, compared with the network that a file of ours names
    Raises UserError where the file doesn't fit.
    """
    check_own_metadata(weights, network)
    whole = vit.state_dict() | ({} if top is None else top.state_dict())
    needed = {
        name: tensor
        for name, tensor in whole.items()
        if blocks is None or block_of(name) is None or block_of(name) in blocks
    }
    # A rank that lacks some files of an index checks what it needs; any other checks the whole teacher.
    checked = needed if weights.container.absent else whole
    dropped = check_fit(checked, weights, depth=vit.depth, may_resize=may_resize)
    tensors, notes = read_tensors(
        weights,
        needed,
        num_prefix={"pos_embed": vit.num_prefix_positions, "decoder_pos_embed": 1},
        grid=vit.grid,
        dtype=dtype,
        device=device,
    )
    for module in (vit,) if top is None else (vit, top):
        mine = {name: tensors[name] for name in module.state_dict() if name in tensors}
        # `assign` puts the tensors that were read in place of the meta ones: nothing is allocated twice.
        module.load_state_dict(mine, strict=blocks is None, assign=True)
        move_buffers(module, dtype, device)
        module.eval().requires_grad_(False)
    return TeacherParts(
        blocks=vit.depth,
        whole_blocks=whole_blocks,
        kept=sum(tensor.numel() for tensor in tensors.values()),
        kept_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        block_parameters=_count(whole, lambda name: block_of(name) is not None),
        decoder_parameters=_count(whole, lambda name: name.startswith("decoder_blocks.")),
        dropped=dropped,
        notes=tuple(notes),
    )


def _count(tensors: dict[str, Tensor], of_kind) -> int:
    return sum(tensor.numel() for name, tensor in tensors.items() if of_kind(name))


def move_buffers(network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Move buffers that are in no file (rotary angles, EVA's zero key bias); angles stay in float32."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta and buffer.is_floating_point():
                kept_dtype = buffer.dtype if name == "rope" else dtype
                module._buffers[name] = buffer.to(device=device, dtype=kept_dtype)
