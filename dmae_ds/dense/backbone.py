"""A timm ViT as the backbone of a dense task: images of any size, maps of chosen blocks."""

from __future__ import annotations

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dmae_ds.config.dense import DenseConfig
from dmae_ds.config.networks import ModelConfig
from dmae_ds.errors import UserError
from dmae_ds.finetune.network import fill_trunk
from dmae_ds.finetune.source import Source
from dmae_ds.models.vit import build_timm_vit

OF_TWELVE = (4, 6, 8, 12)  # blocks of a network of 12 whose outputs UperNet takes (MAE, A.4, after BEiT)


def map_blocks(depth: int) -> list[int]:
    """Numbers from 1 of the four blocks whose outputs a pyramid is made of, scaled to a depth.

    [4, 6, 8, 12] of 12, [8, 12, 16, 24] of 24; a block may come twice in a network of fewer than four.
    """
    return [max(1, round(depth * block / 12)) for block in OF_TWELVE]


def build_backbone(
    network: ModelConfig,
    *,
    seed: int,
    drop_path: float = 0.0,
    where: str = "network",
) -> VisionTransformer | Eva:
    """Build timm's network without a head, for images of any size, with initial weights drawn from `seed`.

    For images of another size positional embeddings are interpolated; images whose sides are no multiple of
    the patch are padded with zeros on the right and below.
    where: the recipe's section, for messages. Raises UserError for a network that can't be built.
    """
    build_timm_vit(network.name, network.overrides(), where=where)
    if ":" in network.name:
        raise UserError(
            f"{where}.name '{network.name}' is a function of your own, and dense tasks require a timm name, "
            "such as vit_base_patch16_224"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(
            network.name,
            num_classes=0,
            drop_path_rate=drop_path,
            dynamic_img_size=True,
            dynamic_img_pad=True,
            **network.overrides(),
        )


def open_backbone(source: Source) -> tuple[VisionTransformer | Eva, int, str]:
    """Build the recipe's backbone, with the weights of its source unless `init` is random.

    Positional embeddings are fitted to network.img_size, the side of training's crops.
    Returns the network, the step of its weights, and a note on them. Raises UserError.
    """
    config: DenseConfig = source.config
    vit = build_backbone(config.network, seed=config.run.seed, drop_path=config.drop_path)
    if config.init == "random":
        return vit, 0, "random initial weights"
    step, note = fill_trunk(vit, source.file, config.format, config.network)
    return vit, step, note


def keep_maps(vit: VisionTransformer | Eva, *, norm: bool) -> None:
    """Remove what stands behind the last block: pooling, and the final norm unless it is kept.

    Parameters that get no gradient would stop DistributedDataParallel.
    """
    vit.prune_intermediate_layers([len(vit.blocks) - 1], prune_norm=not norm, prune_head=True)


def block_maps(
    vit: VisionTransformer | Eva, images: Tensor, blocks: list[int], *, norm: bool = False
) -> list[Tensor]:
    """Patch tokens after each block as maps [N, D, h, w] of the grid; norm: behind the final norm.

    images: normalised, [N, C, H, W]; blocks: numbers from 1, which may repeat
    """
    unique = sorted(set(blocks))
    maps = vit.forward_intermediates(
        images,
        indices=[block - 1 for block in unique],
        norm=norm,
        output_fmt="NCHW",
        intermediates_only=True,
    )
    by_block = dict(zip(unique, maps, strict=True))
    return [by_block[block] for block in blocks]
