"""Teachers of random weights with a recipe's geometry: benches need no file of weights."""

from __future__ import annotations

import time
import zlib

import torch
from torch import Tensor, nn

from dmae_ds.config.run import RunConfig
from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT
from dmae_ds.objectives.base import Objective
from dmae_ds.teacher.frozen import DTYPES, meta_teacher, needed_depths
from dmae_ds.teacher.grid import PatchView
from dmae_ds.teacher.top import Top, meta_top


def check_one_teacher(config: RunConfig, bench: str) -> None:
    """Raise UserError for a recipe with several teachers, which no bench measures together."""
    if config.teachers is not None:
        raise UserError(
            f"bench {bench} measures one teacher, and the recipe has teachers "
            f"{', '.join(config.named_teachers())}; give one of them as `teacher`"
        )


def check_replicated(config: RunConfig, bench: str) -> None:
    """Raise UserError for a teacher that is not whole on every rank, or whose features are read."""
    if config.teacher is not None and config.teacher.placement != "replicated":
        raise UserError(
            f"bench {bench} requires teacher.placement=replicated, found {config.teacher.placement}; "
            "`dmae-ds bench stream` compares placements, `dmae-ds plan` chooses one"
        )


def random_teacher(
    config: RunConfig, depth: int, held: range | None, *, device: torch.device, sleep_ms: float | None
) -> MaskedViT:
    """The teacher's first `depth` blocks with random weights that depend on their names alone.

    held: the blocks of a pipeline stage, the others stay on the meta device; None: all
    sleep_ms: blocks sleep so long instead of computing; None: they compute
    """
    vit = meta_teacher(config.teacher.name, config.teacher.overrides(), depth)
    if sleep_ms is not None:
        for number in range(depth):
            vit.blocks[number] = _SleepingBlock(vit.blocks[number], sleep_ms / 1000)
    skipped: list[nn.Module] = []
    for number, block in enumerate(vit.blocks):
        if held is not None and number not in held:
            skipped += block.modules()
    _fill_randomly(vit, skipped, dtype=DTYPES[config.teacher.dtype], device=device)
    return vit.to(device).eval() if held is None else vit.eval()


def random_top(config: RunConfig, objective: Objective, *, device: torch.device) -> Top | None:
    """The teacher's decoder or classifier, with random weights; None where the objective taps neither."""
    vit = meta_teacher(config.teacher.name, config.teacher.overrides(), keep_norm=True)
    _, decoder_depth = needed_depths(objective.taps, vit.depth, config.teacher.decoder_depth)
    top = meta_top(
        config.teacher,
        vit,
        vit.norm,
        taps=objective.taps,
        decoder_depth=decoder_depth,
        num_classes=objective.num_classes,
    )
    if top is not None:
        _fill_randomly(top, [], dtype=DTYPES[config.teacher.dtype], device=device)
        top.eval()
    return top


def random_teacher_view(config: RunConfig, device: torch.device) -> PatchView:
    """The student's patches resized to the teacher's patch size; pixel statistics stay those of the data."""
    teacher = meta_teacher(config.teacher.name, config.teacher.overrides(), 1)
    mean, std = config.data.mean, config.data.std
    return PatchView(teacher.patch_size, mean=mean, std=std, teacher_mean=mean, teacher_std=std).to(device)


class _SleepingBlock(nn.Module):
    """A block that takes time and computes nothing; its weights stay, to be counted."""

    def __init__(self, block: nn.Module, seconds: float):
        super().__init__()
        self.block, self.seconds = block, seconds

    def forward(self, tokens: Tensor, **kwargs) -> Tensor:
        time.sleep(self.seconds)
        return tokens + 1


def _fill_randomly(
    network: nn.Module, skipped: list[nn.Module], *, dtype: torch.dtype, device: torch.device
) -> None:
    """Replace every meta tensor outside the modules `skipped` by a random one."""
    skipped_ids = {id(module) for module in skipped}
    for name, module in network.named_modules():
        if id(module) in skipped_ids:
            continue
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[key] = _random(f"{name}.{key}", tensor, dtype=dtype, device=device)


def _random(name: str, like: Tensor, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A fixed draw for each name: weights of norms near one, everything else N(0, .02^2)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    draw = 0.02 * torch.randn(like.shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        draw = draw + 1
    tensor = draw.to(dtype=dtype, device=device)
    return nn.Parameter(tensor, requires_grad=False) if isinstance(like, nn.Parameter) else tensor
