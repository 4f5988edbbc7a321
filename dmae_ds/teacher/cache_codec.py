"""What stored features lose: narrower floats, int8 with a scale for each token, fewer dimensions by PCA.

    fp32, bf16, fp16    the numbers, in that dtype
    int8                every channel by its mean and standard deviation, every token by its largest number
    --pca D             the projection on the D directions of most variance; restored to full width

Means, deviations and directions are those of the run's first steps, and are stored with the cache in float32.
Their sums are sums of whole numbers, which float64 adds without rounding: neither the number of ranks nor
their order changes a bit of them.
"""

from __future__ import annotations

from math import ceil, log2, prod
from pathlib import Path

import numpy as np
import torch
from isal import isal_zlib
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dmae_ds.distributed import collectives
from dmae_ds.errors import UserError
from dmae_ds.output.durable import replace_tensors, sync_folder
from dmae_ds.teacher.cache_layout import CODEC, SUMS, StoredTap

PCA_KINDS = ("block", "decoder", "tokens", "cls", "pooled")
VECTORS_A_CHANNEL = 32  # that means and directions are taken from, at least
WHOLE_NUMBERS = 2**14  # to which the largest feature is rounded for the sums
INT8_MAX = 127


class Codec:
    """Turns features of one tap into the bytes of the file, and back.

    mean [D], basis [D, width], scale [width]: float32, on the device of the features; mean and scale only
        where it is int8 or PCA, basis only with PCA
    """

    def __init__(
        self,
        tap: StoredTap,
        *,
        mean: Tensor | None = None,
        basis: Tensor | None = None,
        scale: Tensor | None = None,
    ):
        self.tap, self.mean, self.basis, self.scale = tap, mean, basis, scale
        self.stored, self.dtype = (getattr(torch, name) for name in (tap.stored, tap.dtype))

    def encode(self, features: Tensor) -> Tensor:
        """Encode features [V * n, ..., D], view after view, as [n, num_bytes] uint8."""
        views = self.tap.shape[0]
        # [V * n, ..., D] -> [n, V, ..., D]
        values = features.unflatten(0, (views, -1)).transpose(0, 1)
        if self.mean is not None:
            values = values.float() - self.mean
            values = values if self.basis is None else values @ self.basis
        if self.stored == torch.int8:
            values = values / self.scale
            largest = values.abs().amax(dim=-1, keepdim=True)
            steps = torch.where(largest > 0, largest / INT8_MAX, 1.0)
            numbers = (values / steps).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
            return self._padded(torch.cat([_bytes(steps), _bytes(numbers)], dim=1))
        return self._padded(_bytes(values.to(self.stored)))

    def decode(self, raw: Tensor) -> Tensor:
        """Restore features [V * n, ..., D] in the run's dtype from [n, num_bytes] uint8."""
        tap, num_scales = self.tap, self.tap.scale_bytes
        shape = (*tap.shape[:-1], tap.width)
        end = num_scales + prod(shape) * self.stored.itemsize
        numbers = raw[:, num_scales:end].view(self.stored).unflatten(1, shape)
        if self.mean is None:
            return _by_view(numbers, self.dtype)
        values = _by_view(numbers, torch.float32)
        if self.stored == torch.int8:  # the conversion made new memory
            steps = raw[:, :num_scales].view(torch.float32).unflatten(1, (*shape[:-1], 1))
            values.mul_(_by_view(steps, torch.float32)).mul_(self.scale)
        values = values.add_(self.mean) if self.basis is None else values @ self.basis.T + self.mean
        return values.to(self.dtype)

    def error_sums(self, features: Tensor, raw: Tensor) -> Tensor:
        """Sums [SUMS] float64 of squared errors, squared features, cosines, and the number of vectors."""
        num_vectors = float(len(raw) * self.tap.num_vectors)
        if self.tap.is_exact:
            return torch.tensor([0.0, 0.0, num_vectors, num_vectors], dtype=torch.float64)
        exact, restored = features.double(), self.decode(raw).double()
        cosines = torch.nn.functional.cosine_similarity(exact, restored, dim=-1)
        sums = [(restored - exact).square().sum(), exact.square().sum(), cosines.sum()]
        return torch.tensor([*torch.stack(sums).tolist(), num_vectors], dtype=torch.float64)

    def _padded(self, raw: Tensor) -> Tensor:
        return torch.nn.functional.pad(raw, (0, self.tap.num_bytes - raw.shape[1]))


class FitSums:
    """Sums over the vectors [*, D] of one tap from which means and directions are taken."""

    def __init__(self, width: int, largest: float, device: torch.device):
        """`largest`: the largest absolute feature of the first batches, the same on every rank."""
        self.unit = 2.0 ** ceil(log2(max(largest, 1e-30) / WHOLE_NUMBERS))
        self.count, self.sum, self.products = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), width, (width, width))
        )

    def add(self, features: Tensor) -> None:
        """Add features [..., D]; those beyond twice `largest` count as that."""
        vectors = features.detach().reshape(-1, features.shape[-1]).double() / self.unit
        vectors = vectors.round().clamp(-2 * WHOLE_NUMBERS, 2 * WHOLE_NUMBERS)
        self.count += len(vectors)
        self.sum += vectors.sum(dim=0)
        self.products += vectors.T @ vectors

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] over the vectors of all ranks, float64. Collective."""
        count, total, products = (
            collectives.sum_over_ranks(sums).cpu() for sums in (self.count, self.sum, self.products)
        )
        mean = total / count
        covariance = products / count - torch.outer(mean, mean)
        return mean * self.unit, covariance * self.unit**2


def fit(tap: StoredTap, mean: Tensor, covariance: Tensor) -> dict[str, Tensor]:
    """Mean, directions and scales of a tap, {"mean", "basis", "scale"}, float32; as `Codec` takes them."""
    fitted = {"mean": mean}
    if tap.width < tap.shape[-1]:
        values, vectors = torch.linalg.eigh(covariance)
        fitted["basis"] = vectors.flip(1)[:, : tap.width]
        variances = values.flip(0)[: tap.width]
    else:
        variances = covariance.diagonal()
    deviations = variances.clamp(min=0).sqrt()
    fitted["scale"] = torch.where(deviations > 1e-6 * deviations.max(), deviations, 1.0)
    return {name: tensor.float().contiguous() for name, tensor in fitted.items()}


def needs_fit(tap: StoredTap) -> bool:
    """Whether a tap is stored by means and directions of the data."""
    return tap.stored == "int8" or tap.width < tap.shape[-1]


def check_pca(tap: StoredTap, dimensions: int | None) -> None:
    """Raise UserError where a tap's features have no directions, or no more than are asked for."""
    if dimensions is None:
        return
    if tap.name.rpartition(":")[2].partition("/")[0] not in PCA_KINDS:
        raise UserError(
            f"--pca {dimensions} is for features, and the objective taps {tap.name}; leave --pca out"
        )
    if not 1 <= dimensions < tap.shape[-1]:
        raise UserError(
            f"--pca {dimensions} is not below the {tap.shape[-1]} channels of {tap.name}; give fewer, at "
            "least 1, or leave --pca out"
        )


def write_codec(folder: Path, fitted: dict[str, dict[str, Tensor]]) -> int:
    """Write means, directions and scales by tap; returns the file's crc32. Raises OSError."""
    tensors = {f"{tap}.{name}": tensor for tap, parts in fitted.items() for name, tensor in parts.items()}
    replace_tensors(folder / CODEC, tensors)
    sync_folder(folder)
    return isal_zlib.crc32((folder / CODEC).read_bytes())


def has_codec(folder: Path, crc32: int | None) -> bool:
    """Whether the file that `write_codec` wrote is whole; None: none was needed."""
    path = folder / CODEC
    return crc32 is None or (path.is_file() and isal_zlib.crc32(path.read_bytes()) == crc32)


def build_codecs(taps: tuple[StoredTap, ...], content: bytes | None, device: torch.device) -> list[Codec]:
    """Build the codecs of all taps.

    content: of the file that `write_codec` wrote; None where no tap needs it
    Raises UserError for a file that is not complete.
    """
    try:
        tensors = {} if content is None else load(content)
        return [
            Codec(
                tap,
                **{
                    name: tensors[f"{tap.name}.{name}"].to(device)
                    for name in ("mean", "basis", "scale")
                    if f"{tap.name}.{name}" in tensors
                },
            )
            for tap in taps
        ]
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{CODEC} of the cache is damaged ({error}); copy it again") from None


def relative_error(sums: list[float]) -> dict[str, float]:
    """{"relative": root of squared error over squared features, "cosine": the mean} of sums [SUMS]."""
    assert len(sums) == SUMS
    squared_error, squared, cosines, count = sums
    relative = (squared_error / squared) ** 0.5 if squared else 0.0
    return {"relative": float(f"{relative:.6g}"), "cosine": float(f"{cosines / count:.6g}")}


def _by_view(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [n, V, ...] as [V * n, ...] in another dtype; without a copy where nothing changes."""
    # [n, V, ...] -> [V, n, ...]
    ordered = values.transpose(0, 1)
    if values.dtype == dtype and ordered.is_contiguous():
        return ordered.flatten(0, 1)
    return empty_on(values.device, ordered.shape, dtype).copy_(ordered).flatten(0, 1)


def empty_on(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory without values: on the host numpy's, whose huge pages are several times as fast as torch's."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _bytes(values: Tensor) -> Tensor:
    """The bytes of a tensor [n, ...], as [n, bytes] uint8."""
    return values.contiguous().view(len(values), -1).view(torch.uint8)
