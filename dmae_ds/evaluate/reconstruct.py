"""Pictures as the decoder reconstructs them: original, what the student saw of it, and both put together (as MAE, Fig. 2)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from dmae_ds.data.batch import Batch
from dmae_ds.data.decode import decode
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.transforms import MASK_STREAM, eval_view, sample_rng
from dmae_ds.models.masking import gather_patches
from dmae_ds.models.patches import Normalize, patchify, unpatchify

GREY = 128  # a masked patch: seen on a light and on a dark page


def choose_pictures(
    shard_set: ShardSet, *, num: int, seed: int, img_size: int, num_patches: int, crop_pct: float
) -> tuple[Tensor, Tensor]:
    """`num` pictures (or all, if there are fewer) and the noise of their masks, keyed by the seed: the same for every run.

    Returns images [N, 3, H, W] uint8 and noise [N, L] float32.
    """
    reader = SampleReader(shard_set)
    chosen = np.random.default_rng(seed).permutation(shard_set.num_samples)[:num].tolist()
    images = np.stack(
        [
            eval_view(decode(reader.read(sample_id)), img_size=img_size, crop_pct=crop_pct)
            for sample_id in chosen
        ]
    )
    noise = np.stack(
        [
            sample_rng(seed, 0, sample_id, MASK_STREAM).random(num_patches, dtype=np.float32)
            for sample_id in chosen
        ]
    )
    return torch.from_numpy(images), torch.from_numpy(noise)


@torch.inference_mode()
def reconstruct(
    objective: nn.Module,
    images: Tensor,
    noise: Tensor,
    normalize: Normalize,
    *,
    num_visible: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask pictures and let an objective with a pixel decoder fill them in.

    images [N, 3, H, W] uint8, noise [N, L]
    num_visible: patches that stay (default: as in training). The same noise nests its masks: what fewer show, more show too.
    Returns masked and reconstructed, [N, 3, H, W] uint8; in both, visible patches are the original's, bit for bit.
    """
    batch = objective.prepare(Batch(images, noise), normalize, num_visible=num_visible)
    latent, _ = objective.student(batch.visible, batch.ids_keep)
    pixels = objective.reconstruct(latent, batch)  # [N, L - K, P, P, 3]
    reconstructed = ((pixels - normalize.shift) / normalize.scale).round().clamp(0, 255).to(torch.uint8)
    patches = patchify(images, objective.student.patch_size)  # [N, L, P, P, 3]
    grey = torch.full_like(gather_patches(patches, batch.ids_masked), GREY)
    return tuple(
        _with_patches(patches, batch.ids_masked, new, objective.student.grid) for new in (grey, reconstructed)
    )


def _with_patches(patches: Tensor, ids: Tensor, new: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches [N, L, ...] with those named by ids [N, M] replaced by new [N, M, ...], as pictures [N, 3, H, W]."""
    patches = patches.clone()
    patches[torch.arange(len(ids), device=ids.device)[:, None], ids] = new
    return unpatchify(patches, grid)
