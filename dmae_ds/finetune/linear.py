"""MAE's linear probe: a frozen network, a batch norm without affine part, one linear layer (MAE, A.1).

As in the published code, the batch norm's statistics are those of one rank's micro-batch; ranks do not share
them.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

NORM_EPS = 1e-6
HEAD_STD = 0.01


class LinearProbe(nn.Module):
    """A frozen classifier of which only `network.head` and the features' running statistics are trained."""

    def __init__(self, network: VisionTransformer, *, seed: int):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.head.requires_grad_(True)
        self.norm = nn.BatchNorm1d(network.num_features, affine=False, eps=NORM_EPS)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, std=HEAD_STD, generator=generator)
        nn.init.zeros_(self.head.bias)

    @property
    def head(self) -> nn.Linear:
        """The layer that is trained."""
        return self.network.head

    def train(self, mode: bool = True) -> LinearProbe:
        """Set training mode for all but the frozen network."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C] of images [N, 3, H, W]."""
        with torch.no_grad():
            features = self.network.forward_head(self.network.forward_features(images), pre_logits=True)
        return self.classify(features)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [N, C] of pooled features [N, D]."""
        return self.head(self.norm(features))

    def folded(self) -> dict[str, Tensor]:
        """The network's tensors, with the batch norm folded into the head so that timm alone suffices."""
        scale = (self.norm.running_var + NORM_EPS).rsqrt()  # [D]
        weight = self.head.weight * scale
        return {
            **self.network.state_dict(),
            "head.weight": weight,
            "head.bias": self.head.bias - weight @ self.norm.running_mean,
        }
