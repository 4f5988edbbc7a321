"""Images with masked patches, and as the decoder reconstructs them (as in MAE, Fig. 2)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dmae_ds.data.batch import Batch
from dmae_ds.data.decode import decode
from dmae_ds.data.pixels import RGB, PixelFormat
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.transforms import MASK_STREAM, eval_view, sample_rng
from dmae_ds.models.masking import gather_patches
from dmae_ds.models.patches import Normalize, patchify, unpatchify

GREY = 128  # a masked patch; visible on a light and on a dark page


def choose_images(
    shard_set: ShardSet,
    *,
    num: int,
    seed: int,
    img_size: int,
    num_patches: int,
    crop_pct: float,
    pixels: PixelFormat = RGB,
) -> tuple[Tensor, Tensor]:
    """Choose `num` images (or all, if there are fewer) and the noise of their masks, keyed by the seed.

    Returns images [N, C, H, W] (`Batch.images`) and noise [N, L] float32, the same for every run.
    """
    reader = SampleReader(shard_set)
    chosen = np.random.default_rng(seed).permutation(shard_set.num_samples)[:num].tolist()
    images, noise = [], []
    for sample_id in chosen:
        images.append(eval_view(decode(reader.read(sample_id), pixels), img_size=img_size, crop_pct=crop_pct))
        rng = sample_rng(seed, 0, sample_id, MASK_STREAM)
        noise.append(rng.random(num_patches, dtype=np.float32))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(noise))


@torch.inference_mode()
def reconstruct(
    objective: nn.Module,
    images: Tensor,
    noise: Tensor,
    normalize: Normalize,
    *,
    num_visible: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask images and let an objective with a pixel decoder reconstruct the masked patches.

    images: [N, C, H, W]; noise: [N, L]
    num_visible: number of patches that stay (default: as in training). For the same noise, a larger number of
    visible patches includes those of a smaller one.
    Returns masked and reconstructed images, [N, C, H, W]; visible patches are the original's, bit for
    bit.
    """
    batch = objective.prepare(Batch(images, noise), normalize, num_visible=num_visible)
    latent, _ = objective.student(batch.visible, batch.ids_keep)
    pixels = objective.reconstruct(latent, batch)  # [N, L - K, P, P, 3]
    reconstructed = ((pixels - normalize.shift) / normalize.scale).round().clamp(0, 255).to(images.dtype)
    patches = patchify(images, objective.student.patch_size)  # [N, L, P, P, 3]
    grey = torch.full_like(gather_patches(patches, batch.ids_masked), GREY)
    return tuple(
        _with_patches(patches, batch.ids_masked, new, objective.student.grid) for new in (grey, reconstructed)
    )


def _with_patches(patches: Tensor, ids: Tensor, new: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images [N, C, H, W] of patches [N, L, ...], of which those with ids [N, M] become new [N, M, ...]."""
    patches = patches.clone()
    patches[torch.arange(len(ids), device=ids.device)[:, None], ids] = new
    return unpatchify(patches, grid)
