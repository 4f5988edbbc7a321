"""Standardisation of a teacher's features before a student imitates them.

    layer_norm  every token by itself: mean 0, variance 1 over channels
    zscore      every channel: mean 0, variance 1 over the data
    phi_s       PCA-Hadamard isotropic standardisation (Ranzinger et al. 2024, arXiv 2410.01680): one rotation
    after which
                every channel has variance 1, and one scale for all: no direction is amplified as in zscore

The last two take their statistics from one pass over the data, `dmae-ds teacher stats`. The file next to the
weights contains the teacher's fingerprint, so that statistics of other weights are refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmae_ds.errors import UserError
from dmae_ds.weights.content import STATS

STATS_VERSION = 1


def stats_path(weights: Path) -> Path:
    """The file that `dmae-ds teacher stats` writes by default."""
    if weights.is_dir():
        return weights / STATS
    return weights.with_name(f"{weights.name}.{STATS}")


class LayerNorm:
    """Standardise every token [..., D_t] to mean 0 and variance 1 over its channels, in float32."""

    def __call__(self, tap: str, tokens: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)


class Affine:
    """Standardise by (tokens - mean) @ matrix, or * scale, tap by tap, in float32."""

    def __init__(self, means: dict[str, Tensor], maps: dict[str, Tensor]):
        self.means, self.maps = means, maps

    def __call__(self, tap: str, tokens: Tensor) -> Tensor:
        centred, change = tokens.float() - self.means[tap], self.maps[tap]
        return centred * change if change.ndim == 1 else centred @ change


def zscore_scale(covariance: Tensor) -> Tensor:
    """One over each channel's standard deviation, [D], from a covariance [D, D]; 0 for a constant channel."""
    variance = covariance.diagonal().double()
    return torch.where(variance > 1e-12 * variance.max(), variance.clamp(min=1e-300).rsqrt(), 0.0).float()


def phi_s_matrix(covariance: Tensor) -> Tensor:
    """The matrix M [D, D] of PHI-S (Sec. 3) from a covariance [D, D].

    Every channel of y = (x - mean) @ M has variance 1. M turns the eigenvectors by a Hadamard matrix and has
    one scale for all channels. Raises UserError where this program knows no Hadamard matrix of order D.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    phi = values.clamp(min=0).mean().sqrt()
    return (vectors @ hadamard(len(values)).T / phi).float()


def hadamard(order: int) -> Tensor:
    """An orthogonal matrix [n, n] float64 with entries +-1/sqrt(n).

    Made by Sylvester's doubling of one of Paley's constructions. Raises UserError where neither gives one.
    """
    doublings, core = 0, order
    while True:
        matrix = _paley(core)
        if matrix is not None:
            break
        if core % 2:
            raise UserError(
                f"teacher.standardize=phi_s needs a Hadamard matrix of order {order}, which neither "
                "Sylvester's nor Paley's construction gives; set teacher.standardize=zscore"
            )
        doublings, core = doublings + 1, core // 2
    for _ in range(doublings):
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / order**0.5


def _paley(order: int) -> Tensor | None:
    """Order 1; q + 1 for a prime q = 3 mod 4; 2 (q + 1) for a prime q = 1 mod 4. Entries +-1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4:
        return None
    if _is_prime(order - 1):
        skew = _jacobsthal(order - 1, sign=-1.0)
        return torch.eye(order, dtype=torch.float64) + skew
    if _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        symmetric = _jacobsthal(order // 2 - 1, sign=1.0)
        eye = torch.eye(len(symmetric), dtype=torch.float64)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(eye, minus)
    return None


def _jacobsthal(q: int, *, sign: float) -> Tensor:
    """A matrix [q + 1, q + 1] of quadratic residues of differences, bordered by ones, with zero diagonal."""
    residues = {x * x % q for x in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if x in residues else -1.0 for x in range(1, q)], dtype=torch.float64)
    places = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = chi[(places[:, None] - places[None, :]) % q]
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def read_stats(path: Path, taps: tuple[str, ...]) -> tuple[dict[str, Tensor], dict]:
    """Read tensors `<tap>.mean` [D] and `<tap>.covariance` [D, D], and the file's facts about itself.

    Raises UserError.
    """
    if not path.is_file():
        raise UserError(
            f"teacher.standardize needs the statistics file '{path}', which was not found; make it with: "
            "dmae-ds teacher stats RECIPE"
        )
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            if about["version"] != STATS_VERSION:
                raise UserError(
                    f"'{path}' has format version {about['version']}, this program reads {STATS_VERSION}; "
                    "make it again with dmae-ds teacher stats"
                )
            names = set(file.keys())
            missing = [tap for tap in taps if f"{tap}.mean" not in names]
            if missing:
                raise UserError(
                    f"'{path}' has statistics of {', '.join(about['taps'])}, not of {', '.join(missing)}; "
                    "make it again with dmae-ds teacher stats"
                )
            wanted = [f"{tap}.{moment}" for tap in taps for moment in ("mean", "covariance")]
            return {name: file.get_tensor(name) for name in wanted}, about
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"'{path}' is not a complete statistics file ({error}); make it again with dmae-ds teacher stats"
        ) from None


def build_target(
    kind: str, taps: tuple[str, ...], stats: dict[str, Tensor] | None, device: torch.device
) -> LayerNorm | Affine | None:
    """Build the function (tap, tokens [..., D_t]) -> target in float32; None leaves features as they are."""
    if kind == "none":
        return None
    if kind == "layer_norm":
        return LayerNorm()
    make = {"zscore": zscore_scale, "phi_s": phi_s_matrix}[kind]
    return Affine(
        {tap: stats[f"{tap}.mean"].float().to(device) for tap in taps},
        {tap: make(stats[f"{tap}.covariance"]).to(device) for tap in taps},
    )
