"""Networks of other implementations as references.

Each has its weights in a published layout and its features by its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dmae_ds.models.vit import find_builder

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TAP = 2
IDS = torch.tensor([[3, 0, 9, 7], [15, 2, 4, 8]])  # kept patches, in no order, different for each image


@dataclass
class Reference:
    """A tiny network of another implementation, and its weights in a published layout.

    tensors: as they are named in the file; save: (folder, tensors) -> the path for teacher.weights
    whole: images -> the residual stream after block TAP, by the implementation's own forward
    embed: images -> (tokens [N, R + 16, 32], rotary angles, one row a patch, or None)
    blocks: (tokens of one image, angles) -> tokens
    """

    name: str
    format: str
    tensors: dict[str, Tensor]
    save: Callable[[Path, dict], Path]
    whole: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    blocks: list[Callable]
    overrides: dict = field(default_factory=lambda: SHAPE)
    num_prefix: int = 1  # tokens in front of the patches, CLS first
    has_cls: bool = True
    first_matrix: str = "mlp.fc1"  # a matrix of a block that is not square, by timm's name
    model: nn.Module | None = None

    @torch.no_grad()
    def features(self, images: Tensor, ids: Tensor | None) -> Tensor:
        """CLS, where there is one, and the kept patches: [N, 1 + K, D], image by image.

        ids: None keeps all patches and takes the network's own forward
        """
        if ids is None:
            tokens = self.whole(images)
        else:
            embedded, angles = self.embed(images)
            kept = []
            for one, keep in zip(embedded, ids, strict=True):
                one = torch.cat([one[: self.num_prefix], one[self.num_prefix :][keep]])[None]
                for block in self.blocks[:TAP]:
                    one = block(one, None if angles is None else angles[keep])
                kept.append(one)
            tokens = torch.cat(kept)
        patches = tokens[:, self.num_prefix :]
        return torch.cat([tokens[:, :1], patches], dim=1) if self.has_cls else patches


def shake(model: nn.Module) -> nn.Module:
    """Move every parameter from its initial value, so that none hides a wrong place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def as_safetensors(folder: Path, tensors: dict, name: str = "model.safetensors", **metadata: str) -> Path:
    """Write tensors as a .safetensors file."""
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        folder / name,
        metadata=metadata or None,
    )
    return folder / name


def as_pth(entry: str | None = None, **others) -> Callable[[Path, dict], Path]:
    """A writer of .pth files: the tensors under `entry`, next to other entries, or at the top level."""

    def save(folder: Path, tensors: dict) -> Path:
        torch.save({entry: tensors, **others} if entry else tensors, folder / "checkpoint.pth")
        return folder / "checkpoint.pth"

    return save


def pooling_vit(**kwargs) -> nn.Module:
    """A network with CLS whose attention pool reads the patches alone."""
    return timm.create_model("vit_tiny_patch16_224", global_pool="map", **kwargs)


def timm_reference(
    name: str, format: str, rename: Callable[[dict], dict] = dict, save=as_safetensors, **kwargs
) -> Reference:
    """timm's network `name`, its state dict renamed to the layout."""
    model = shake(find_builder(name, "teacher")(num_classes=0, **SHAPE))

    def whole(images: Tensor) -> Tensor:
        _, (tapped,) = model.forward_intermediates(
            images, indices=[TAP - 1], return_prefix_tokens=True, output_fmt="NLC", norm=False
        )
        if isinstance(tapped, Tensor):
            return tapped
        patches, prefix = tapped
        return torch.cat([prefix, patches], dim=1)

    def embed(images: Tensor) -> tuple[Tensor, Tensor | None]:
        embedded = model._pos_embed(model.patch_embed(images))
        tokens, angles = embedded if isinstance(embedded, tuple) else (embedded, None)
        return model.norm_pre(tokens), angles

    def block(module: nn.Module) -> Callable:
        return lambda tokens, angles: module(tokens) if angles is None else module(tokens, rope=angles)

    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    return Reference(
        name,
        format,
        rename(state),
        save,
        whole,
        embed,
        [block(module) for module in model.blocks],
        num_prefix=model.num_prefix_tokens,
        has_cls=model.cls_token is not None,
        model=model,
        **kwargs,
    )
