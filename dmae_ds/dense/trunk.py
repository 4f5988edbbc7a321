"""A timm ViT as the trunk of a dense network: images of any size to maps of its blocks.

Attention may be confined to windows, with a few global blocks (ViTDet, Sec. 3). ViTDet's relative positions
are left out: positions are the network's own, interpolated to the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dmae_ds.dense.backbone import block_maps
from dmae_ds.errors import UserError


class VitTrunk(nn.Module):
    """A timm ViT, built with `dynamic_img_size=True`, that returns the maps of some of its blocks.

    taps: block numbers, counted from 1; window: edge of a window in patches, None: attention is global
    global_blocks: blocks with global attention where there are windows
    With windows there are no CLS and register tokens, as in ViTDet, which belong to no window.
    Parameters that no map depends on (the final norm, pooling, blocks behind the last tap) get no gradients.
    Raises UserError for windows in a network of other blocks than timm's `Block`.
    """

    def __init__(
        self,
        vit: VisionTransformer | Eva,
        taps: Sequence[int],
        *,
        window: int | None = None,
        global_blocks: Sequence[int] = (),
    ):
        super().__init__()
        other = next((type(block).__name__ for block in vit.blocks if type(block) is not Block), None)
        if window is not None and other is not None:
            raise UserError(
                f"network.name has blocks of timm's class {other}, windows require its plain Block; "
                "set detector.window=null, or choose a network such as vit_base_patch16_224"
            )
        self.vit, self.taps, self.window = vit, tuple(taps), window
        self.global_blocks = frozenset(global_blocks)
        self.width, self.patch_size = vit.embed_dim, vit.patch_embed.patch_size[0]
        unused = [vit.norm, vit.fc_norm, vit.attn_pool, *vit.blocks[max(self.taps) :]]
        for module in unused:
            if module is not None:
                module.requires_grad_(False)
        if window is not None:
            for token in (vit.cls_token, vit.reg_token):
                if token is not None:
                    token.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images [N, 3, H, W] to one [N, D, H / P, W / P] per tap: the residual stream after the block.

        H, W: multiples of the patch size P
        """
        if self.window is None:
            return block_maps(self.vit, images, list(self.taps))
        vit, patch = self.vit, self.patch_size
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        tokens, maps = tokens[:, vit.num_prefix_tokens :], []
        for number, block in enumerate(vit.blocks[: max(self.taps)], start=1):
            if number in self.global_blocks:
                tokens = block(tokens)
            else:
                tokens = run_in_windows(block, tokens, grid, self.window)
            if number in self.taps:
                # [N, h * w, D] -> [N, D, h, w]
                maps.append(tokens.transpose(1, 2).reshape(len(images), self.width, *grid))
        return maps


def quarter_ends(depth: int) -> list[int]:
    """Numbers of the last blocks of the four quarters of a network, counted from 1: 3, 6, 9, 12 of 12."""
    return sorted({-(-depth * quarter // 4) for quarter in range(1, 5)})


def run_in_windows(block: Block, tokens: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Run a timm block whose attention sees one window of patches at a time (ViTDet, Sec. 3).

    tokens: [N, h * w, D], patches alone; grid: (h, w)
    A window is no larger than the grid, so a large one is global attention. Where the grid is not a multiple
    of the window, normalised tokens are padded by zeros, which are attended to, as in ViTDet's code.
    """
    windows, padded = partition(block.norm1(tokens).unflatten(1, grid), window)
    attended = unpartition(block.attn(windows), padded, grid, window)
    tokens = tokens + block.drop_path1(block.ls1(attended.flatten(1, 2)))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def partition(tokens: Tensor, window: int) -> tuple[Tensor, tuple[int, int]]:
    """Cut [N, h, w, D] into windows [N * windows, tokens of a window, D], padded by zeros below and right.

    Returns the windows and the padded (h, w).
    """
    n, height, width, dim = tokens.shape
    rows, columns = min(window, height), min(window, width)
    tokens = F.pad(tokens, (0, 0, 0, -width % columns, 0, -height % rows))
    padded = tokens.shape[1], tokens.shape[2]
    # [N, h / rows, rows, w / columns, columns, D] -> [N, h / rows, w / columns, rows, columns, D]
    cut = tokens.reshape(n, padded[0] // rows, rows, padded[1] // columns, columns, dim).transpose(2, 3)
    return cut.reshape(-1, rows * columns, dim), padded


def unpartition(windows: Tensor, padded: tuple[int, int], grid: tuple[int, int], window: int) -> Tensor:
    """Put windows of `partition` together again, without the padding: [N, h, w, D]."""
    rows, columns = min(window, grid[0]), min(window, grid[1])
    # [N, h / rows, w / columns, rows, columns, D] -> [N, h / rows, rows, w / columns, columns, D]
    shape = (-1, padded[0] // rows, padded[1] // columns, rows, columns, windows.shape[-1])
    tokens = windows.reshape(shape).transpose(2, 3).reshape(-1, *padded, windows.shape[-1])
    return tokens[:, : grid[0], : grid[1]]
