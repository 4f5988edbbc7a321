"""MAE files of random weights, with encoder and decoder, in the published layout."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Iterator

import torch
from timm.models.vision_transformer import Block

from dmae_ds.errors import UserError
from dmae_ds.models.vit import build_timm_vit
from dmae_ds.output.durable import replacing
from dmae_ds.weights.containers import open_container

DECODER_DEPTH, DECODER_DIM, DECODER_HEADS = 8, 512, 16  # in all published MAEs, ViT-B to ViT-H

Shapes = dict[str, tuple[int, ...]]


def make_files(folder: Path, name: str, shapes: Shapes) -> list[Path]:
    """Make a .pth and a .safetensors of the same random tensors; complete files from earlier are kept.

    Raises OSError where the folder can't be written or is too small.
    """
    stem = f"random-mae-{name.replace('/', '_').replace(':', '_')}"
    safetensors, pth = folder / f"{stem}.safetensors", folder / f"{stem}.pth"
    if not is_whole(safetensors, shapes):
        _write_safetensors(safetensors, shapes)
    if not is_whole(pth, shapes):
        with _writing(pth) as file:
            # The only time that all tensors are in memory.
            torch.save({"model": dict(open_container(safetensors))}, file)
    return [pth, safetensors]


def mae_shapes(name: str) -> Shapes:
    """Shapes of a published MAE by name in its file: timm's names for the encoder, decoder_* for the rest."""
    vit = build_timm_vit(name, {}, where="teacher")
    shapes = {key: tuple(tensor.shape) for key, tensor in vit.state_dict().items()}
    patch, tokens = vit.patch_embed.patch_size[0], 1 + vit.patch_embed.num_patches
    shapes |= {"mask_token": (1, 1, DECODER_DIM), "decoder_pos_embed": (1, tokens, DECODER_DIM)}
    shapes |= {"decoder_embed.weight": (DECODER_DIM, vit.embed_dim), "decoder_embed.bias": (DECODER_DIM,)}
    with torch.device("meta"):
        block = Block(DECODER_DIM, DECODER_HEADS, qkv_bias=True).state_dict()
    shapes |= {
        f"decoder_blocks.{number}.{key}": tuple(tensor.shape)
        for number in range(DECODER_DEPTH)
        for key, tensor in block.items()
    }
    shapes |= {"decoder_norm.weight": (DECODER_DIM,), "decoder_norm.bias": (DECODER_DIM,)}
    return shapes | {"decoder_pred.weight": (3 * patch**2, DECODER_DIM), "decoder_pred.bias": (3 * patch**2,)}


def num_bytes(shapes: Shapes) -> int:
    """Bytes of all tensors in float32, without the file's header."""
    return 4 * sum(map(math.prod, shapes.values()))


def is_whole(path: Path, shapes: Shapes) -> bool:
    """Whether the file exists, is complete, and holds these tensors."""
    try:
        return {key: place.shape for key, place in open_container(path, ("model",)).places.items()} == shapes
    except UserError:
        return False


@contextmanager
def _writing(path: Path) -> Iterator[BinaryIO]:
    """Like `replacing`, but an incomplete file is removed, since it may have gigabytes."""
    try:
        with replacing(path) as file:
            yield file
    except RuntimeError:  # raised by torch.save on a full disk
        raise OSError(f"'{path}' could not be written completely") from None
    finally:
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)


def _write_safetensors(path: Path, shapes: Shapes) -> None:
    """Write with one tensor in memory at a time (safetensors' own writer needs all)."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with _writing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(torch.empty(shape).normal_(std=0.02, generator=generator).numpy())
