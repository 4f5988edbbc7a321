"""DINO's head: a token -> how near it is to each prototype (Caron et al., ICCV 2021, Sec. 3.1 and Appendix C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Prototypes(nn.Linear):
    """Products of unit vectors with unit prototypes [..., bottleneck] -> [..., K].

    The published layer is weight-normed with its lengths held at 1 (`norm_last_layer`). torch's weight_norm would bring them
    in as a parameter that is never trained, which every ZeRO stage and checkpoint would meet; here they aren't there.
    """

    def forward(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, functional.normalize(self.weight, dim=-1))


class DinoHead(nn.Module):
    """Three linear layers with GELU between them, l2 normalisation, prototypes: [..., D] -> [..., K] in -1 to 1."""

    def __init__(
        self,
        embed_dim: int,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        num_prototypes: int,
        generator: torch.Generator,
    ):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = Prototypes(bottleneck_dim, num_prototypes, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.prototypes(functional.normalize(self.layers(tokens), dim=-1))
