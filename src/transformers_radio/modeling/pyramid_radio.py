"""ViTDet's simple pyramid (arXiv 2203.16527, Sec. 3): maps at several strides from those of one."""

import math
from typing import Any

import torch
from torch import nn

from .errors_radio import shown
from .fields_radio import is_integer


def check_strides(strides: Any, stride: int):
    """Raises ValueError unless `strides` increase, each `stride` times or divided by a power of two."""
    is_list = isinstance(strides, (list, tuple)) and len(strides) > 0 and all(is_integer(one, 1) for one in strides)
    if not is_list or any(math.frexp(one / stride)[0] != 0.5 for one in strides) or sorted(set(strides)) != [*strides]:
        possible = [int(stride * 2.0**power) for power in range(-4, 3) if stride * 2.0**power % 1 == 0]
        raise ValueError(
            f"strides is {shown(strides)}, expected a list of increasing strides such as {possible[-4:]}: features "
            f"have stride {stride}, and a pyramid doubles or halves it."
        )


class RadioMapLayerNorm(nn.LayerNorm):  # transformers initializes classes of norms by the end of their name
    """LayerNorm over the channels of maps `(B, C, h, w)`."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        # (B, C, h, w) -> (B, h, w, C) -> (B, C, h, w)
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RadioSimplePyramid(nn.Module):
    """`(B, width, h, w)` at `stride` pixels -> one `(B, out_channels, ...)` per stride of `strides`.

    A finer map comes from transposed convolutions, each of which doubles the resolution and halves the channels, a
    coarser one from max pooling, one of the same stride from the features. Then, for each, a 1x1 and a 3x3
    convolution, both with a LayerNorm.
    """

    def __init__(self, width: int, stride: int, strides: list[int], out_channels: int = 256):
        super().__init__()
        check_strides(strides, stride)
        self.levels = nn.ModuleList(self._level(width, wanted / stride, out_channels) for wanted in strides)

    def _level(self, width: int, scale: float, out_channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        while scale < 1:
            layers += [nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)]
            width, scale = width // 2, 2 * scale
            if scale < 1:
                layers += [RadioMapLayerNorm(width), nn.GELU()]
        if scale > 1:
            layers += [nn.MaxPool2d(kernel_size=int(scale), stride=int(scale))]
        layers += [nn.Conv2d(width, out_channels, kernel_size=1, bias=False), RadioMapLayerNorm(out_channels)]
        layers += [nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)]
        return nn.Sequential(*layers, RadioMapLayerNorm(out_channels))

    def forward(self, maps: torch.Tensor) -> list[torch.Tensor]:
        return [level(maps) for level in self.levels]
