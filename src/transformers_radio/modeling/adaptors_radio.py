"""Adaptor heads: one summary head and one feature head per teacher (paper Sec. 3.2), and the released forms."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .inputs_radio import returns_tensors_only


@dataclass
class AdaptorOutput(ModelOutput):
    """What the student predicts of one teacher: its summary and features, in float32.

    Args:
        summary (`torch.Tensor` of shape `(batch, summary_dim)`): `None` for a teacher without a summary (SAM).
        features (`torch.Tensor` of shape `(batch, h * w, feature_dim)`): Row-major, `h` and `w` times
            `upsample_factor`; `None` for a teacher without features. Packed inputs: `(total patches, feature_dim)`.
        grid (`tuple[int, int]`): `(h, w)` of `features`, `upsample_factor` included. `None` without features, and
            where that of [`RadioModelOutput`] is.
    """

    summary: torch.Tensor | None = None
    features: torch.Tensor | None = None
    grid: tuple[int, int] | None = None


class RadioAdaptorMLP(nn.Module):
    """`fc1`, `num_inner` residual blocks, `final`: with `num_inner=0` the paper's Linear, LayerNorm, GELU, Linear.

    `pre_norm` puts LayerNorm and GELU before `fc1`.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_inner: int = 0, pre_norm: bool = False):
        super().__init__()

        def norm_gelu_linear(width):
            return nn.Sequential(nn.LayerNorm(hidden_dim), nn.GELU(), nn.Linear(hidden_dim, width))

        self.pre_norm = nn.Sequential(nn.LayerNorm(in_dim), nn.GELU()) if pre_norm else nn.Identity()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.blocks = nn.ModuleList([norm_gelu_linear(hidden_dim) for _ in range(num_inner)])
        self.final = norm_gelu_linear(out_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(self.pre_norm(hidden_states))
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return self.final(hidden_states)


class RadioAdaptorMLPV1(nn.Module):
    """The head of version 1 releases: `fc1`, `norm`, ReLU, `inner` (Linear, LayerNorm, ReLU each), `fc2`."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_inner: int = 0):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        inner = [[nn.Linear(hidden_dim, hidden_dim), nn.LayerNorm(hidden_dim), nn.ReLU()] for _ in range(num_inner)]
        self.inner = nn.Sequential(*[module for block in inner for module in block])
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.inner(F.relu(self.norm(self.fc1(hidden_states)))))


class RadioAdaptorLayerScale(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.gamma


class RadioAdaptorAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, dim = hidden_states.shape
        # (B, L, 3D) -> (B, L, 3, heads, D/heads) -> 3 x (B, heads, L, D/heads)
        qkv = self.qkv(hidden_states).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(query, key, value)
        # (B, heads, L, D/heads) -> (B, L, D)
        return self.proj(attention.transpose(1, 2).reshape(batch, length, dim))


class RadioAdaptorBlockMLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class RadioAdaptorBlock(nn.Module):
    """Pre-norm transformer block with LayerScale; LayerNorm eps as in current timm."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RadioAdaptorAttention(dim, num_heads)
        self.ls1 = RadioAdaptorLayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = RadioAdaptorBlockMLP(dim)
        self.ls2 = RadioAdaptorLayerScale(dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.ls1(self.attn(self.norm1(hidden_states)))
        return hidden_states + self.ls2(self.mlp(self.norm2(hidden_states)))


class RadioAdaptorAttentionHead(nn.Module):
    """The `attn` feature head of C-RADIOv4: two blocks with 16 heads, then the MLP of version 2."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_heads: int = 16):
        super().__init__()
        if in_dim % num_heads:
            raise ValueError(f'spatial_mlp_version="attn" needs a width divisible by {num_heads}, got {in_dim}.')
        self.blocks = nn.ModuleList([RadioAdaptorBlock(in_dim, num_heads) for _ in range(2)])
        self.mlp = RadioAdaptorMLP(in_dim, hidden_dim, out_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.mlp(hidden_states)


class RadioAdaptor(nn.Module):
    """Both heads of one teacher, built from one entry of `RadioConfig.adaptors`.

    Args:
        width (`int`): Width of the backbone's tokens.
        adaptor (`dict`): An entry of `RadioConfig.adaptors`.
        summary_width (`int`, *optional*): Width of the summary tokens where it is another one.
    """

    def __init__(self, width: int, adaptor: dict[str, Any], summary_width: int | None = None):
        super().__init__()
        self.summary_token = adaptor["summary_token"]
        self.upsample_factor = adaptor["upsample_factor"]
        mlps: dict[str, Any] = {
            "v1": RadioAdaptorMLPV1,
            "v2": partial(RadioAdaptorMLP, pre_norm=adaptor["mlp_pre_norm"]),
        }
        hidden, inner, version = adaptor["hidden_dim"], adaptor["mlp_num_inner"], adaptor["mlp_version"]
        self.summary_head: nn.Module | None = None
        self.feature_head: nn.Module | None = None
        if adaptor["summary_dim"] is not None:
            self.summary_head = mlps[version](summary_width or width, hidden, adaptor["summary_dim"], inner)
        if adaptor["feature_dim"] is not None:
            out_dim = adaptor["feature_dim"] * self.upsample_factor**2
            version = adaptor["spatial_mlp_version"] or version
            if version == "attn":
                self.feature_head = RadioAdaptorAttentionHead(width, hidden, out_dim)
            else:
                self.feature_head = mlps[version](width, hidden, out_dim, inner)

    def forward(
        self, summary_tokens: torch.Tensor, features: torch.Tensor, grids: list[tuple[int, int]]
    ) -> AdaptorOutput:
        """
        Args:
            summary_tokens (`torch.Tensor` of shape `(batch, tokens, summary width)`): CLS tokens, or the average.
            features (`torch.Tensor` of shape `(batch, h * w, width)`): Row-major. Packed inputs:
                `(1, total patches, width)`.
            grids (`list[tuple[int, int]]`): The patch grid `(h, w)`, the same for the whole batch; one per image
                for packed inputs.
        """
        summary, dense, grid = None, None, None
        if self.summary_head is not None:
            summary = self.summary_head(summary_tokens[:, self.summary_token]).float()
        if self.feature_head is not None:
            images = zip(features.split([rows * cols for rows, cols in grids], dim=1), grids, strict=True)
            dense = torch.cat([self._upsample(self.feature_head(image), size) for image, size in images], dim=1)
            dense = dense.float()
            if len(grids) == 1 and not returns_tensors_only():
                grid = (grids[0][0] * self.upsample_factor, grids[0][1] * self.upsample_factor)
        return AdaptorOutput(summary=summary, features=dense, grid=grid)

    def _upsample(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        factor = self.upsample_factor
        if factor == 1:
            return features
        # (B, h*w, u*u*C) -> (B, h, w, u, u, C) -> (B, h, u, w, u, C) -> (B, h*u * w*u, C)
        features = features.unflatten(1, grid).unflatten(-1, (factor, factor, -1))
        return features.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
