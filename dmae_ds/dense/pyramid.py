"""Feature pyramids on a plain ViT: ViTDet's from its last map, and an FPN on four maps.

Both return an ordered dictionary of five maps of equal width, as torchvision's detectors take it: strides
P / 4, P / 2, P, 2P and 4P pixels for patches of P pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

SCALES = (4, 2, 1, 0.5)  # of the first four levels, in maps per patch


def rescale(width: int, scale: float) -> tuple[nn.Module, int]:
    """Layers that make a map [N, width, h, w] `scale` times as large, and the width of their result.

    Transposed convolutions halve the width each time they double the map (ViTDet, Sec. 3).
    """
    if scale == 4:
        layers = [
            nn.ConvTranspose2d(width, width // 2, 2, stride=2),
            LayerNorm2d(width // 2),
            nn.GELU(),
            nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
        ]
        return nn.Sequential(*layers), width // 4
    if scale == 2:
        return nn.ConvTranspose2d(width, width // 2, 2, stride=2), width // 2
    if scale == 1:
        return nn.Identity(), width
    return nn.MaxPool2d(2), width


class SimplePyramid(nn.Module):
    """ViTDet's simple feature pyramid (Sec. 3): every level is made from the last map alone.

    Each of four levels: rescaled, 1x1 convolution, layer norm, 3x3 convolution, layer norm; the fifth is
    every second value of the fourth.
    """

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.levels = nn.ModuleList()
        for scale in SCALES:
            layers, channels = rescale(width, scale)
            self.levels.append(
                nn.Sequential(
                    layers,
                    nn.Conv2d(channels, out_channels, 1, bias=False),
                    LayerNorm2d(out_channels),
                    nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                    LayerNorm2d(out_channels),
                )
            )

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Make five levels from the last of `maps`, [N, D, h, w]; h and w must be even."""
        pyramid = OrderedDict((str(number), level(maps[-1])) for number, level in enumerate(self.levels))
        pyramid["pool"] = F.max_pool2d(pyramid["3"], 1, stride=2)
        return pyramid


class FourMapPyramid(nn.Module):
    """An FPN (torchvision's) on the maps of four blocks, made x4, x2, x1 and /2 as large (SdAE, Table 4).

    The norm between the two transposed convolutions is a layer norm; BEiT's published code, which SdAE
    follows, has a batch norm over all GPUs there.
    """

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        rescaled = [rescale(width, scale) for scale in SCALES]
        self.rescale = nn.ModuleList(layers for layers, _ in rescaled)
        widths = [channels for _, channels in rescaled]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Make five levels from four maps [N, D, h, w], the deepest last; h and w must be even."""
        scaled = [layers(features) for layers, features in zip(self.rescale, maps, strict=True)]
        return self.fpn(OrderedDict((str(number), features) for number, features in enumerate(scaled)))
