"""A teacher's fingerprint: features of a fixed input as sixteen figures a block; do they look trained?

The input has no positions, so that a teacher fitted to another grid keeps its fingerprint: fixed patches are
projected, CLS and registers are put in front, rotary angles are zero. `dmae-ds teacher slice` and `inspect
--write` store the figures next to the weights; every run that finds them compares.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Callable, Iterable

import torch
from torch import Tensor, nn

from dmae_ds.errors import UserError
from dmae_ds.models.vit import MaskedViT

NUM_PATCHES = 16  # of each of two fixed images
NUM_FIGURES = 16
# Largest difference, over the figures' root mean square: other weights differ by about 1.4, rounding by less.
TOLERANCE = {torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.2}

Fingerprint = dict[str, list[float]]


@dataclass(frozen=True)
class Probe:
    """Features of the fixed input.

    features: {block: [2, R + 16, D] float32}, 0 being the embedded tokens
    pristine: every norm's gain is one and every bias zero, as before any training
    """

    features: dict[int, Tensor]
    pristine: bool


@torch.no_grad()
def probe(vit: MaskedViT, blocks: Iterable[nn.Module] | None = None) -> Probe:
    """Run the fixed input through the embedding and the blocks.

    blocks: instead of the network's own; may come one by one, where not all fit into memory
    """
    weight = vit.patch_embed.proj.weight
    size = (2, NUM_PATCHES, vit.patch_size, vit.patch_size, vit.channels)
    # Golden-ratio steps: spread like noise, the same on every machine and in every version.
    noise = (torch.arange(torch.Size(size).numel(), dtype=torch.float64) * 0.6180339887498949) % 1
    slow = torch.sin(torch.arange(torch.Size(size).numel(), dtype=torch.float64) / 97)
    pixels = (2 * noise - 1 + slow).reshape(size).to(device=weight.device, dtype=torch.float32)
    tokens = vit.patch_embed.proj(pixels)
    in_front = [
        token.to(tokens.dtype).expand(2, -1, -1)
        for token in (vit.cls_token, vit.reg_token)
        if token is not None
    ]
    tokens = vit.norm_pre(torch.cat([*in_front, tokens], dim=1))
    rope = None
    if vit.rope is not None:  # sine 0, cosine 1: no rotation
        half = vit.rope.shape[-1] // 2
        rope = torch.cat([torch.zeros(half), torch.ones(half)]).to(vit.rope).expand(NUM_PATCHES, -1)
    features, pristine = {0: tokens.float()}, True
    for number, block in enumerate(vit.blocks if blocks is None else blocks, start=1):
        tokens = block(tokens) if rope is None else block(tokens, rope=rope)
        features[number] = tokens.float()
        pristine = pristine and is_pristine(block)
    return Probe(features, pristine)


@torch.no_grad()
def probe_top(top: nn.Module, vit: MaskedViT, tokens: Tensor) -> dict[str, Tensor]:
    """Outputs of the part above the encoder on the same input, {tap: [2, ...] float32}.

    tokens: after the encoder's last block; every patch but the fixed ones is masked
    """
    kept = min(NUM_PATCHES, vit.num_patches - 1)
    ids = torch.arange(vit.num_patches, device=tokens.device).expand(2, -1)
    cls = tokens[:, : int(vit.cls_token is not None)]
    patches = tokens[:, vit.num_prefix : vit.num_prefix + kept]
    dtype = next((parameter.dtype for parameter in top.parameters()), torch.float32)
    encoded = torch.cat([cls, patches], dim=1).to(dtype)
    outputs = top(encoded, ids[:, :kept], ids[:, kept:])
    return {tap: output.float() for tap, output in outputs.items()}


def is_pristine(block: nn.Module) -> bool:
    """Whether every norm's gain is one and every bias zero."""
    gains = [p for name, p in block.named_parameters() if "norm" in name and name.endswith("weight")]
    biases = [p for name, p in block.named_parameters() if name.endswith("bias")]
    return all(bool((gain == 1).all()) for gain in gains) and not any(bool(bias.any()) for bias in biases)


def fingerprint(features: dict[int, Tensor]) -> Fingerprint:
    """Sixteen figures for each block: {"block/18": [...]}.

    They are means over tokens, summed over interleaved channels with alternating signs, scaled by the width.
    """
    figures_of = {}
    for number, tokens in features.items():
        if number == 0:
            continue
        mean = tokens.double().mean(dim=(0, 1)).cpu()  # [D]
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(mean) // 2 + 1)[: len(mean)]
        groups = torch.arange(len(mean)) * 7919 % NUM_FIGURES
        figures = torch.zeros(NUM_FIGURES, dtype=torch.float64).index_add_(0, groups, mean * signs)
        scaled = figures / sqrt(len(mean) / NUM_FIGURES)
        figures_of[f"block/{number}"] = [float(f"{value:.9g}") for value in scaled]
    return figures_of


def check_fingerprint(
    figures_of: Fingerprint, stored: Fingerprint, *, dtype: torch.dtype, where: str
) -> None:
    """Raise UserError where a block's figures differ from the stored ones by more than rounding.

    where: the file that holds the stored ones
    """
    for tap, figures in figures_of.items():
        if tap not in stored:
            continue
        expected = torch.tensor(stored[tap], dtype=torch.float64)
        largest = (torch.tensor(figures, dtype=torch.float64) - expected).abs().max()
        difference = largest / expected.square().mean().sqrt().clamp(min=1e-12)
        if not difference <= TOLERANCE[dtype]:
            raise UserError(
                f"the teacher's features at {tap} differ from the fingerprint in {where} by "
                f"{difference:.2g} of its size, so it was made from other weights; give the right file, or "
                "make the fingerprint again with dmae-ds teacher inspect --write"
            )


def check_alive(features: dict[str, Tensor]) -> None:
    """Raise UserError unless features of the fixed input are finite and differ between tokens and images.

    features: {tap: [2, T, ...], or one vector an image [2, C]: logits, CLS, pooled}
    """
    for tap, tokens in features.items():
        if not torch.isfinite(tokens).all():
            raise UserError(
                f"the teacher's features at {tap} are not finite on a fixed input; the weights are damaged, "
                "or teacher.dtype is too narrow for them"
            )
        # CLS and registers come first, and always differ; logits and the like are one token an image.
        patches = tokens[:, None] if tokens.ndim == 2 else tokens[:, -NUM_PATCHES:].flatten(2)
        spread, size = patches.std(dim=(0, 1)).mean(), patches.square().mean().sqrt()
        if not spread > 1e-5 * size:
            raise UserError(
                f"the teacher's features at {tap} are the same for every patch of a fixed input; the "
                "weights are damaged or empty"
            )


def find_untrained(vit: MaskedViT, probed: Probe) -> str:
    """The reason why this network looks freshly initialised; empty where it doesn't.

    vit: may be on the meta device
    Two signs: every norm's gain is one and every bias zero; or the features grow from block to block like
    those of a freshly initialised network of the same shape. On the quickstart's networks, features of
    trained ones grew 3.7 to 13 times over three quarters of the depth, those of fresh ones 1.0 to 2.8 times.
    """
    if probed.pristine:
        return "every norm's gain is 1 and every bias 0, as before any training"
    growth = _growth(probed.features)
    for init, spread in (
        ("timm's", lambda fan_in, fan_out: 0.02),
        ("MAE's", lambda fan_in, fan_out: sqrt(2 / (fan_in + fan_out))),
    ):
        fresh = _growth(_probe_fresh(vit, probed.features[0], spread))
        if (growth - fresh).abs().max() < 0.25:
            times = f"{growth.exp()[-1]:.2f} times; a fresh network's {fresh.exp()[-1]:.2f}"
            return f"features grow from block to block as with {init} initial weights ({times})"
    return ""


def _growth(features: dict[int, Tensor]) -> Tensor:
    """Growth of the features' size from the embedded tokens to each block: logarithms [blocks]."""
    sizes = torch.stack([features[number].square().mean().sqrt().cpu() for number in sorted(features)])
    return (sizes[1:] / sizes[0].clamp(min=1e-12)).log()


@torch.no_grad()
def _probe_fresh(vit: MaskedViT, tokens: Tensor, spread: Callable[[int, int], float]) -> dict[int, Tensor]:
    """Features of freshly initialised blocks on the same embedded tokens; one block exists at a time.

    spread: (inputs, outputs of a matrix) -> standard deviation of its entries
    """
    generator = torch.Generator(device=tokens.device).manual_seed(0)
    features = {0: tokens}
    for number, block in enumerate(vit.blocks, start=1):
        fresh = copy.deepcopy(block).to_empty(device=tokens.device).float()
        for buffer in fresh.buffers():
            buffer.zero_()
        for name, parameter in fresh.named_parameters():
            if parameter.ndim >= 2:
                bound = sqrt(3) * spread(parameter.flatten(1).shape[1], parameter.shape[0])
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            else:
                # Layer scale begins at 1e-5 (DINOv2, DINOv3, EVA), norms at one, biases at zero.
                is_gain = "norm" in name and name.endswith("weight")
                nn.init.constant_(parameter, 1e-5 if "gamma" in name else float(is_gain))
        tokens = fresh(tokens)
        features[number] = tokens
    return features


def sidecar(path: Path) -> Path:
    """The file with the fingerprint of a weights file: next to it, or in the folder of slices."""
    return path / "teacher.json" if path.is_dir() else path.with_name(path.name + ".teacher.json")


def read_sidecar(path: Path) -> dict | None:
    """The facts that `inspect --write` or `slice` stored about these weights, or None.

    Raises UserError for a broken file.
    """
    file = sidecar(path)
    if not file.is_file():
        return None
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {**known, "fingerprint": dict(known["fingerprint"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"'{file}' can't be read ({type(error).__name__}: {error}); write it again with dmae-ds teacher "
            "inspect --write, or delete it"
        ) from None
