"""A convolution that is fast for small maps too."""

import torch
import torch.nn.functional as F
from torch import nn

_FEW = 128  # places of the result, of all images; measured on a Xeon, where 200 still gain for the widest convolutions


class ERadioConv(nn.Conv2d):
    """`nn.Conv2d`, computed as a matrix product where the result is small, on a CPU and with channels-last weights.

    oneDNN reorders all weights in every call. For few places, such as the 7 x 7 of one image of 224 pixels at stride
    32, that takes longer than the product. Square kernels without dilation and groups, zeros as padding.
    """

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or maps.device.type != "cpu":
            return super().forward(maps)  # compilers choose for themselves, and an export has symbols as sides
        size, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        rows, cols = ((side + 2 * padding - size) // stride + 1 for side in maps.shape[-2:])
        channels_last = self.weight.is_contiguous(memory_format=torch.channels_last)
        if maps.shape[0] * rows * cols >= _FEW or not channels_last:
            return super().forward(maps)
        # (B, C, H, W) -> (B, C, h, w, k, k) -> (B, h, w, k, k, C) -> (B, h, w, k*k*C), the order of weights in memory
        patches = F.pad(maps, (padding,) * 4).unfold(2, size, stride).unfold(3, size, stride)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (O, C, k, k) -> (O, k, k, C) -> (O, k*k*C)
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)  # (B, h, w, O) -> (B, O, h, w)
