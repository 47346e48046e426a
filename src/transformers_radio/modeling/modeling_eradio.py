"""E-RADIO, the efficient student: convolutions, then attention in windows, then a neck at stride 16 (paper Sec. 5.1)."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_eradio import ERadioConfig


class ERadioConvNorm(nn.Module):
    """Convolution without bias, then batch norm. `fuse` makes one convolution of the two."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(maps))

    @torch.no_grad()
    def fuse(self):
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class ERadioStem(nn.Module):
    """`(B, 3, H, W)` -> `(B, C, H/4, W/4)`."""

    def __init__(self, config: ERadioConfig):
        super().__init__()
        self.conv1 = ERadioConvNorm(config.num_channels, config.stem_channels, stride=2)
        self.conv2 = ERadioConvNorm(config.stem_channels, config.embed_dim, stride=2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(pixels))))


class ERadioBottleneck(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ERadioConvNorm(channels, channels)
        self.conv2 = ERadioConvNorm(channels, channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + F.silu(self.conv2(F.silu(self.conv1(maps))))


class ERadioC2f(GradientCheckpointingLayer):
    """The block of YOLOv8: half of the channels go through `depth` bottlenecks, and every step's output is kept."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        half = channels // 2
        self.conv1 = ERadioConvNorm(channels, channels, kernel_size=1)
        self.bottlenecks = nn.ModuleList([ERadioBottleneck(half) for _ in range(depth)])
        self.conv2 = ERadioConvNorm((2 + depth) * half, channels, kernel_size=1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        parts = list(F.silu(self.conv1(maps)).chunk(2, dim=1))
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        return F.silu(self.conv2(torch.cat(parts, dim=1)))


class ERadioPositionBias(nn.Module):
    """The continuous relative position bias of Swin v2: a small MLP of the offset between two places of a window.

    The bias is 16 * sigmoid(MLP(offset)), with offsets in [-1, 1] on the logarithmic scale sign(o) * log2(1 + |8 o|) / 3.
    """

    def __init__(self, num_heads: int, hidden: int = 512):
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, num_heads, bias=False)

    def forward(self, size: int) -> torch.Tensor:
        """Windows of `size` x `size` places -> `(heads, size**2, size**2)`."""
        device, dtype = self.fc1.weight.device, self.fc1.weight.dtype
        steps = torch.arange(1 - size, size, device=device, dtype=torch.float32)
        steps = 8 * steps / max(size - 1, 1)
        steps = steps.sign() * torch.log2(1 + steps.abs()) / 3
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)  # (2s-1, 2s-1, 2): rows, columns
        table = 16 * torch.sigmoid(self.fc2(F.relu(self.fc1(offsets.to(dtype)))))  # (2s-1, 2s-1, heads)
        place = torch.arange(size, device=device)
        difference = place[:, None] - place[None, :] + size - 1  # (s, s): from each query to each key
        # (2s-1, 2s-1, heads) -> (s, s, s, s, heads): query row, key row, query column, key column
        bias = table[difference[:, :, None, None], difference[None, None, :, :]]
        # -> (heads, query row, query column, key row, key column) -> (heads, s*s, s*s)
        return bias.permute(4, 0, 2, 1, 3).reshape(-1, size**2, size**2)


class ERadioAttention(nn.Module):
    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels, bias=False)
        self.position_bias = ERadioPositionBias(num_heads)

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """tokens: `(B * windows, W*W, C)`, bias: `(heads, W*W, W*W)`, added to the logits."""
        # (N, L, 3C) -> (N, L, 3, heads, C/heads) -> 3 x (N, heads, L, C/heads)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype)[None])
        # (N, heads, L, C/heads) -> (N, L, C)
        return self.proj(output.transpose(1, 2).flatten(2))


class ERadioMLP(nn.Module):
    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(channels, int(ratio * channels), bias=False)
        self.fc2 = nn.Linear(int(ratio * channels), channels, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class ERadioWindowBlock(GradientCheckpointingLayer):
    """Attention within windows, at half the resolution for "global" attention; half input, half result.

    Args:
        subsample (`bool`): Halve the map before and double it behind attention.
        pre_convolution (`bool`): A 3x3 convolution with a residual before attention that is not subsampled.
    """

    def __init__(self, channels: int, num_heads: int, config: ERadioConfig, subsample: bool):
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels, 2, stride=2) if subsample else None
        self.expand = nn.ConvTranspose2d(channels, channels, 2, stride=2) if subsample else None
        self.pre_conv = ERadioConvNorm(channels, channels) if config.pre_convolution and not subsample else None
        self.norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.attention = ERadioAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = ERadioMLP(channels, config.mlp_ratio)

    def forward(self, maps: torch.Tensor, window: int) -> torch.Tensor:
        """maps: `(B, C, H, W)`, sides multiples of `window`, of twice that where the block subsamples."""
        shortcut = maps
        if self.reduce is not None:
            maps = self.reduce(maps)
        elif self.pre_conv is not None:
            maps = maps + self.pre_conv(maps)
        batch, channels, rows, cols = maps.shape
        # (B, C, H, W) -> (B, H, W, C) -> (B, H/w, w, W/w, w, C) -> (B, H/w, W/w, w, w, C) -> (B*windows, w*w, C)
        tokens = maps.permute(0, 2, 3, 1).reshape(batch, rows // window, window, cols // window, window, channels)
        tokens = tokens.transpose(2, 3).reshape(-1, window**2, channels)
        tokens = tokens + self.attention(self.norm1(tokens), self.attention.position_bias(window))
        tokens = tokens + self.mlp(self.norm2(tokens))
        # (B*windows, w*w, C) -> (B, H/w, W/w, w, w, C) -> (B, H/w, w, W/w, w, C) -> (B, H, W, C) -> (B, C, H, W)
        tokens = tokens.reshape(batch, rows // window, cols // window, window, window, channels)
        maps = tokens.transpose(2, 3).reshape(batch, rows, cols, channels).permute(0, 3, 1, 2)
        if self.expand is not None:
            maps = self.expand(maps)
        return (maps + shortcut) / 2


class ERadioNeck(nn.Module):
    """The maps of stages 3 and 4 as one, `(B, hidden_size, H/16, W/16)`: each to that size and width, then the sum.

    `config.neck` says how: "pixel_shuffle" (batch norm, a 1x1 convolution to four times the channels for stage 4,
    which become 2x2 places) or "depthwise" (nearest neighbors, a depthwise 3x3 convolution, batch norm, 1x1).
    """

    def __init__(self, config: ERadioConfig):
        super().__init__()
        self.kind, out = config.neck, config.hidden_size
        self.depthwise, self.norms, self.convs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for channels, scale in ((config.channels[2], 1), (config.channels[3], 2)):
            if self.kind == "depthwise":
                self.depthwise.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
            self.norms.append(nn.BatchNorm2d(channels))
            self.convs.append(nn.Conv2d(channels, out * (scale**2 if self.kind == "pixel_shuffle" else 1), 1))

    def forward(self, stage3: torch.Tensor, stage4: torch.Tensor) -> torch.Tensor:
        if self.kind == "pixel_shuffle":
            fine, coarse = self.convs[0](self.norms[0](stage3)), self.convs[1](self.norms[1](stage4))
            return fine + F.pixel_shuffle(coarse, 2)
        coarse = F.interpolate(stage4, scale_factor=2, mode="nearest")
        fine, coarse = (
            conv(norm(depthwise(maps)))
            for depthwise, norm, conv, maps in zip(
                self.depthwise, self.norms, self.convs, (stage3, coarse), strict=True
            )
        )
        return fine + coarse

    @torch.no_grad()
    def fuse(self):
        for index, norm in enumerate(self.norms):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            if self.kind == "depthwise":
                self.depthwise[index] = nn.utils.fusion.fuse_conv_bn_eval(self.depthwise[index], norm)
            else:  # a 1x1 convolution behind the norm: its weights take the scale, its bias the shift
                conv = self.convs[index]
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # (C,)
                shift = norm.bias - norm.running_mean * scale
                conv.bias += conv.weight.flatten(1) @ shift  # (out, C) @ (C,)
                conv.weight *= scale[:, None, None]
            self.norms[index] = nn.Identity()
