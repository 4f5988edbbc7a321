"""A timm vision transformer that embeds and runs only visible patches: the student, and the frozen teacher.

timm builds the network and names its parameters (`patch_embed.proj`, `blocks.N...`, `norm`), so that a student's file
loads into `timm.create_model(name, num_classes=0)` with strict=True, and a timm file loads into a teacher.
"""

from __future__ import annotations

from typing import Iterable

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.positions import sincos_positions


def build_timm_vit(name: str, overrides: dict, *, depth: int | None = None, where: str = "student") -> VisionTransformer:
    """`timm.create_model` without a classifier, random weights; `depth` builds only the first blocks.

    Raises UserError for an unknown name, numbers that don't fit, or a network whose tokens this project can't mask.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3]
        raise UserError(f"{where}.name '{name}' is unknown to timm {timm.__version__}; " + (f"near: {', '.join(near)}" if near else "see timm.list_models('vit*')"))
    if depth is not None:
        overrides = {**overrides, "depth": depth}
    img_size, patch_size = overrides.get("img_size"), overrides.get("patch_size")
    if img_size and patch_size and img_size % patch_size:
        raise UserError(f"{where}.img_size {img_size} is not a multiple of {where}.patch_size {patch_size}")
    try:
        vit = timm.create_model(name, num_classes=0, **overrides)
    except (AssertionError, TypeError) as error:
        raise UserError(f"{where}: timm can't build '{name}' with {overrides}: {error}") from None
    if not isinstance(vit, VisionTransformer) or vit.num_prefix_tokens != 1 or not vit.has_class_token or vit.pos_embed is None or vit.no_embed_class:
        raise UserError(f"{where}.name '{name}' is not a plain vision transformer with one CLS token and position codes; use a vit_* such as vit_base_patch16_224")
    return vit


class PatchProjection(nn.Conv2d):
    """timm's patch convolution applied to patches that are already cut out: one matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        # [N, K, P, P, C] -> [N, K, C * P * P] in the order of the convolution's weight [D, C, P, P]
        flat = patches.permute(0, 1, 4, 2, 3).flatten(2)
        return nn.functional.linear(flat.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class MaskedViT(nn.Module):
    """The encoder on visible patches: embed, add positions, prepend CLS, run the blocks (MAE, Sec. 3).

    Built from a timm network, whose modules it takes over; `keep_norm=False` leaves the final norm out.
    `pos_embed` is a buffer: fixed, saved, never trained.

    A backward pass leaves in `gradient_norms` what came down into each tapped block: {block: {"tap": from the tap,
    "trunk": from the layers above}}, scalars on the device.
    """

    def __init__(self, vit: VisionTransformer, *, keep_norm: bool = True):
        super().__init__()
        self.gradient_norms: dict[int, dict[str, Tensor]] = {}
        self.embed_dim = vit.embed_dim
        self.grid = tuple(vit.patch_embed.grid_size)
        self.patch_size = vit.patch_embed.patch_size[0]
        conv = vit.patch_embed.proj
        self.patch_embed = nn.Module()
        self.patch_embed.proj = PatchProjection(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=conv.bias is not None,
            device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        self.patch_embed.proj.load_state_dict(conv.state_dict(), assign=True)
        self.patch_embed.proj.requires_grad_(True)
        self.cls_token = vit.cls_token
        self.register_buffer("pos_embed", vit.pos_embed.detach())
        self.norm_pre = vit.norm_pre
        self.blocks = nn.ModuleList(vit.blocks)
        self.norm = vit.norm if keep_norm else None

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def embed(self, visible: Tensor, ids_keep: Tensor) -> Tensor:
        """Visible pixels [N, K, P, P, C] at the places ids_keep [N, K] -> tokens [N, 1 + K, D], CLS first."""
        tokens = self.patch_embed.proj(visible)
        tokens = tokens + self.pos_embed[0, 1:].to(tokens.dtype)[ids_keep]
        cls = (self.cls_token + self.pos_embed[:, :1]).to(tokens.dtype).expand(len(tokens), -1, -1)
        return self.norm_pre(torch.cat([cls, tokens], dim=1))

    def forward(self, visible: Tensor, ids_keep: Tensor, taps: Iterable[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Run all blocks; `taps` are block numbers counted from 1.

        Returns the last tokens [N, 1 + K, D] (after the final norm, where it is kept) and the residual stream right
        after each tapped block, CLS included, before any final norm: {block: [N, 1 + K, D]}.
        """
        tokens = self.embed(visible, ids_keep)
        tapped = {}
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in taps:
                tapped[number], tokens = self._fork(number, tokens)
        return (tokens if self.norm is None else self.norm(tokens)), tapped

    def _fork(self, number: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens twice, for the tap and for the layers above, so that backward can tell the two gradients apart."""
        tap, trunk = tokens.view_as(tokens), tokens.view_as(tokens)
        if tokens.requires_grad:
            norms = self.gradient_norms.setdefault(number, {})
            for name, branch in (("tap", tap), ("trunk", trunk)):
                branch.register_hook(lambda gradient, name=name: norms.update({name: gradient.detach().float().norm()}))
        return tap, trunk


def build_student(name: str, overrides: dict, *, generator: torch.Generator) -> MaskedViT:
    """A student with MAE's initialisation and fixed sin-cos positions (MAE, Sec. 3 and A.1)."""
    with torch.device("meta"):
        student = MaskedViT(build_timm_vit(name, overrides))
    student.to_empty(device="cpu")
    student.pos_embed = sincos_positions(student.embed_dim, student.grid)
    initialize_as_mae(student, generator)
    return student


def initialize_as_mae(module: nn.Module, generator: torch.Generator) -> None:
    """MAE's published initialisation: Xavier-uniform matrices (patch projection as a matrix), zero biases, tokens N(0, .02^2)."""
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif parameter.ndim >= 2:
            nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)
