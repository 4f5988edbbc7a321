"""A timm vision transformer that embeds and runs only visible patches: the student, and the frozen teacher.

timm builds the network and names its parameters (`patch_embed.proj`, `blocks.N...`, `norm`). So a student's
file loads into `timm.create_model(name, num_classes=0)` with strict=True, and a timm file into a teacher.
Both may be any timm VisionTransformer or Eva: MAE, DINOv2 (registers, layer scale), CLIP, SigLIP (no CLS),
EVA-02 and DINOv3 (rotary positions).
"""

from __future__ import annotations

from typing import Callable, Iterable

import timm
import torch
from accelerate import init_empty_weights
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from dmae_ds.config.own_code import import_own
from dmae_ds.errors import UserError
from dmae_ds.models.initial import freeze, initialize_as_mae, initialize_layer_scale
from dmae_ds.models.positions import sincos_positions
from dmae_ds.models.recompute import run_twice


def build_timm_vit(
    name: str, overrides: dict, *, depth: int | None = None, where: str = "student"
) -> VisionTransformer | Eva:
    """Build timm's network without a classifier, on the meta device; buffers (rotary angles) are real.

    name: a timm model, or `module:function` that takes the overrides and returns a VisionTransformer or Eva
    depth: only the first blocks are built; where: the recipe's section, for messages
    Raises UserError for an unknown name, numbers that don't fit, or a network whose tokens can't be masked.
    """
    if depth is not None:
        overrides = {**overrides, "depth": depth}
    img_size, patch_size = overrides.get("img_size"), overrides.get("patch_size")
    if img_size and patch_size and img_size % patch_size:
        raise UserError(f"{where}.img_size {img_size} is not a multiple of {where}.patch_size {patch_size}")
    create = find_builder(name, where)
    try:
        with init_empty_weights(include_buffers=False):
            vit = create(num_classes=0, **overrides)
    except (AssertionError, TypeError) as error:
        raise UserError(
            f"{where}: '{name}' can't be built with {overrides}: {error}; check its numbers, or use a "
            "vision transformer such as vit_base_patch16_224"
        ) from None
    except RuntimeError as error:
        # The constructor computes with its weights: learned rotary frequencies, a convolutional stem.
        raise UserError(
            f"{where}.name '{name}' can't be built without its weights ({error}); use a vision transformer "
            "such as vit_base_patch16_224"
        ) from None
    problem = _why_not(vit)
    if problem:
        raise UserError(
            f"{where}.name '{name}' {problem}; use a vision transformer such as vit_base_patch16_224"
        )
    return vit


def find_builder(name: str, where: str) -> Callable[..., nn.Module]:
    """The function that builds a network: timm's by its name, or your own `module:function`.

    Raises UserError that names the recipe's section `where`.
    """
    if ":" in name:
        try:
            return import_own(name)
        except ImportError as error:
            raise UserError(
                f"{where}.name '{name}' can't be imported ({error}); give module:function, or a timm name"
            ) from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3]
        raise UserError(
            f"{where}.name '{name}' is unknown to timm {timm.__version__}; "
            + (f"similar names: {', '.join(near)}" if near else "see timm.list_models('vit*')")
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(
            f"{where}.name '{name}': {error} See timm.list_pretrained('{name.split('.')[0]}*')"
        ) from None
    return lambda **kwargs: timm.create_model(name, **kwargs)


def _why_not(vit: nn.Module) -> str | None:
    """The reason why this network's tokens can't be masked, or None."""
    for cls in (VisionTransformer, Eva):
        if isinstance(vit, cls):
            if type(vit)._pos_embed is not cls._pos_embed:
                return "embeds its patches differently from other networks"
            if type(vit.patch_embed) is not PatchEmbed or not isinstance(vit.patch_embed.norm, nn.Identity):
                return "has no plain patch projection"
            if getattr(vit, "rope_mixed", False):
                return "learns rotary frequencies in each block"
            return None
    return f"is a {type(vit).__name__}, neither timm's VisionTransformer nor its Eva"


class PatchProjection(nn.Conv2d):
    """timm's patch convolution on patches that are already cut out: one matrix product."""

    def forward(self, patches: Tensor) -> Tensor:
        # [N, K, P, P, C] -> [N, K, C * P * P] in the order of the convolution's weight [D, C, P, P]
        flat = patches.permute(0, 1, 4, 2, 3).flatten(2)
        return nn.functional.linear(flat.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class MaskedViT(nn.Module):
    """The encoder on visible patches: embed, add positions, prepend CLS, run the blocks (MAE, Sec. 3).

    It takes over the modules of a timm network; `keep_norm=False` leaves the final norm out. `pos_embed` is a
    buffer, fixed and saved, unless the student learns it or an objective makes it a parameter. Tokens have
    timm's order: CLS, registers, patches.
    R: number of tokens in front of the patches (1 for a plain ViT, 0 for SigLIP, 5 for DINOv2 with registers)
    drops_registers: whether `forward` leaves the registers out of what it returns, as a student does: they
        are run, and never imitated or decoded

    A backward pass stores in `gradient_norms` the norms of the gradients at each tapped block: {block:
    {"tap": of the tap's gradient, "trunk": of the gradient from the layers above}}, scalars on the device.
    """

    def __init__(self, vit: VisionTransformer | Eva, *, keep_norm: bool = True):
        super().__init__()
        self.gradient_norms: dict[int, dict[str, Tensor]] = {}
        self.embed_dim = vit.embed_dim
        self.grid = tuple(vit.patch_embed.grid_size)
        self.patch_size = vit.patch_embed.patch_size[0]
        self.num_prefix = vit.num_prefix_tokens
        conv = vit.patch_embed.proj
        self.channels = conv.in_channels
        self.patch_embed = nn.Module()
        self.patch_embed.proj = PatchProjection(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            bias=conv.bias is not None,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.patch_embed.proj.load_state_dict(conv.state_dict(), assign=True)
        self.patch_embed.proj.requires_grad_(True)
        self.cls_token, self.reg_token = vit.cls_token, vit.reg_token
        self.register_buffer("pos_embed", None if vit.pos_embed is None else vit.pos_embed.detach())
        # Rows of pos_embed that belong to CLS and registers.
        self.num_prefix_positions = (
            0 if vit.no_embed_class or vit.pos_embed is None else vit.num_prefix_tokens
        )
        self.register_buffer("rope", _rotary_angles(vit, self.grid), persistent=False)
        self.norm_pre = vit.norm_pre
        self.blocks = nn.ModuleList(vit.blocks)
        self.norm = vit.norm if keep_norm else None
        self.drops_registers = False
        self.checkpoint_blocks = False  # see recompute.py
        self._other_grids: dict[tuple, Tensor] = {}  # positional embeddings of smaller images

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_cls(self) -> int:
        """Number of CLS tokens: 1, or 0 for SigLIP."""
        return int(self.cls_token is not None)

    @property
    def is_plain(self) -> bool:
        """Whether CLS, one token, and every patch have a positional embedding, and none is rotary."""
        return (
            self.cls_token is not None
            and self.num_prefix == self.num_prefix_positions == 1
            and self.rope is None
        )

    @property
    def token_dtype(self) -> torch.dtype:
        """Dtype of the tokens between blocks: that of the weights, float32 under autocast.

        Autocast makes the patch projection's output bfloat16; position codes and the sums of all blocks would
        keep three digits in it, where timm and MAE's published code keep float32.
        """
        # A frozen projection is a buffer, and DeepSpeed casts only parameters.
        return (self.patch_embed.proj.weight if self.cls_token is None else self.cls_token).dtype

    def positions(self, grid: tuple[int, int] | None, device: torch.device) -> Tensor | None:
        """Positional embedding of the patches [L, D], in `token_dtype`.

        grid: of images of another size, for plain students only. Sin-cos embeddings are computed for the
        smaller grid, which covers the extent of the network's own: like DINO's interpolation of learned
        embeddings, without its blur.
        """
        if self.pos_embed is None:
            return None
        if grid is None or grid == self.grid:
            return self.pos_embed[0, self.num_prefix_positions :].to(self.token_dtype)
        assert self.is_plain, "only a plain student has positions for other grids"
        key = (grid, device, self.token_dtype)
        if key not in self._other_grids:
            codes = sincos_positions(self.embed_dim, grid, span=self.grid)[0, 1:]
            self._other_grids[key] = codes.to(device, self.token_dtype)
        return self._other_grids[key]

    def embed(
        self,
        visible: Tensor,
        ids_keep: Tensor,
        grid: tuple[int, int] | None = None,
        *,
        replace: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Embed visible pixels [N, K, P, P, C] at ids_keep [N, K] of a grid: tokens [N, R + K, D].

        grid: by default the network's own; replace: puts mask tokens among the projected patches [N, K, D]
        """
        tokens = self.patch_embed.proj(visible).to(self.token_dtype)
        if replace is not None:
            tokens = replace(tokens)
        split = self.num_prefix_positions
        positions = self.positions(grid, tokens.device)
        if positions is not None:
            # Not positions[ids_keep]: on CPUs its gradient is summed in whatever order threads come.
            tokens = tokens + F.embedding(ids_keep, positions)
        in_front = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if in_front:
            prefix = torch.cat(in_front, dim=1)
            prefix = prefix + self.pos_embed[:, :split] if split else prefix
            tokens = torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        return self.norm_pre(tokens)

    def run_block(self, block: nn.Module, tokens: Tensor, ids_keep: Tensor) -> Tensor:
        """Run one block; with rotary positions every kept patch has its own angles."""
        if self.rope is None:
            return block(tokens)
        # [N, 1, K, 2 * D / heads]: the same for all heads
        return block(tokens, rope=self.rope[ids_keep].unsqueeze(1))

    def forward(
        self,
        visible: Tensor,
        ids_keep: Tensor,
        taps: Iterable[int] = (),
        *,
        grid: tuple[int, int] | None = None,
        appended: Tensor | None = None,
        depth: int | None = None,
        replace: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run all blocks.

        taps: block numbers, counted from 1; grid: of images of another size, see `positions`
        appended: [1, T, D] tokens after the patches of every image, without positions (no rotary networks)
        depth: run only so many blocks, and no final norm; replace: as `embed` takes it

        Returns the last tokens [N, R + K, D] (after the final norm, where it is kept) and the residual stream
        right after each tapped block, before any final norm: {block: [N, R + K, D]}. Without registers they
        are [N, 1 + K, D], or [N, K, D] where there is no CLS.
        """
        tokens = self.embed(visible, ids_keep, grid, replace=replace)
        if appended is not None:
            tokens = torch.cat([tokens, appended.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)
        tapped = {}
        for number, block in enumerate(self.blocks[:depth], start=1):
            if self.checkpoint_blocks:
                tokens = run_twice(self.run_block, block, tokens, ids_keep)
            else:
                tokens = self.run_block(block, tokens, ids_keep)
            if number in taps:
                tap, tokens = self._fork(number, tokens)
                tapped[number] = self._returned(tap)
        has_norm = self.norm is not None and depth is None
        return self._returned(self.norm(tokens) if has_norm else tokens), tapped

    def _returned(self, tokens: Tensor) -> Tensor:
        """The tokens that `forward` returns: all of them, or those that are no registers."""
        if not self.drops_registers or self.num_prefix == self.num_cls:
            return tokens
        return torch.cat([tokens[:, : self.num_cls], tokens[:, self.num_prefix :]], dim=1)

    def _fork(self, number: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens twice, for the tap and for the layers above: backward measures both gradients."""
        tap, trunk = tokens.view_as(tokens), tokens.view_as(tokens)
        if tokens.requires_grad:
            norms = self.gradient_norms.setdefault(number, {})
            for name, branch in (("tap", tap), ("trunk", trunk)):
                branch.register_hook(
                    lambda gradient, name=name: norms.update({name: gradient.detach().float().norm()})
                )
        return tap, trunk


def _rotary_angles(vit: VisionTransformer | Eva, grid: tuple[int, int]) -> Tensor | None:
    """Sine and cosine of every patch's position [L, 2 * D / heads]; None where positions are not rotary."""
    rope = getattr(vit, "rope", None)
    if rope is None:
        return None
    rope.eval()  # some move the positions at random in training
    has_grid = getattr(rope, "feat_shape", None) is not None
    return rope.get_embed() if has_grid else rope.get_embed(shape=list(grid))


def build_student(
    name: str, overrides: dict, *, generator: torch.Generator, device: str = "cpu"
) -> MaskedViT:
    """Build a student with MAE's initialisation and the positions of its family (MAE, Sec. 3 and A.1).

    A plain ViT (CLS, and one embedding for it and each patch) has fixed sin-cos positions. Other families
    have their own: rotary angles, and embeddings that are learned from N(0, .02^2); their registers begin
    there too, and layer scale where timm's network begins. An attention pool or norm above the tokens, which
    no objective trains, stays as it was drawn or read, so that the file has every tensor of timm's network.
    device: `meta` gives the geometry alone
    """
    vit = build_timm_vit(name, overrides)
    student = MaskedViT(vit)
    student.drops_registers = True
    above = {part: getattr(vit, part, None) for part in ("attn_pool", "fc_norm")}
    for part, module in above.items():
        if module is not None and any(True for _ in module.parameters()):
            student.add_module(part, module)
    # In no file: rotary angles, EVA's zero key bias.
    computed = {name: buffer for name, buffer in student.named_buffers() if not buffer.is_meta}
    is_plain = student.is_plain
    if not is_plain and student.pos_embed is not None:
        positions = student.pos_embed
        del student.pos_embed
        student.pos_embed = nn.Parameter(positions)
    student.to_empty(device=device)
    if is_plain:
        student.pos_embed = sincos_positions(student.embed_dim, student.grid)
    initialize_as_mae(student, generator)
    if not is_plain:
        initialize_layer_scale(student)
    for name, buffer in student.named_buffers():
        if name in computed and device != "meta":
            buffer.copy_(computed[name])
    for part in above:
        if hasattr(student, part):
            freeze(getattr(student, part))
    return student
