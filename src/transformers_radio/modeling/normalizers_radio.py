"""Fixed linear maps that some released checkpoints bring, which give features of each layer unit scale."""

import torch
from torch import nn
from transformers import initialization as init

from .errors_radio import shown


class RadioFeatureNormalizer(nn.Module):
    """`(x - mean) @ tx.T` on the patch tokens behind the last block (RADIOv2.5-H-norm)."""

    def __init__(self, dim: int):
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(dim))
        self.tx = nn.Buffer(torch.eye(dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., dim)` -> the same."""
        return (features - self.mean) @ self.tx.mT


class RadioIntermediateNormalizer(nn.Module):
    """`alpha * (x - mean) @ rotation.T`, the PHI-S standardization of the patch tokens behind each block.

    The model's outputs do not pass through it: call it with what a block returned.

    Args:
        layers (`int`): Number of blocks.
        rotations (`"shared"` or `"per_layer"`): One rotation for all blocks, or one for each.
    """

    def __init__(self, layers: int, dim: int, rotations: str):
        super().__init__()
        self.alphas = nn.Buffer(torch.ones(layers))
        self.means = nn.Buffer(torch.zeros(layers, dim))
        eye = torch.eye(dim)
        self.rotation = nn.Buffer(eye.repeat(layers, 1, 1) if rotations == "per_layer" else eye)

    def forward(self, features: torch.Tensor, block: int) -> torch.Tensor:
        """`(..., dim)`, the patch tokens behind block `block`, counted from 0 -> the same.

        Raises:
            ValueError: There is no such block.
        """
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < len(self.alphas):
            raise ValueError(f"block is {shown(block)}, expected an integer from 0 to {len(self.alphas) - 1}.")
        rotation = self.rotation if self.rotation.ndim == 2 else self.rotation[block]
        return self.alphas[block] * (features - self.means[block]) @ rotation.mT


def init_as_identity(normalizer: RadioFeatureNormalizer | RadioIntermediateNormalizer):
    """Statistics with which a normalizer changes nothing; those that were loaded are left alone."""
    for name, statistic in normalizer.named_buffers():
        value = torch.zeros_like(statistic) if name.startswith("mean") else torch.ones_like(statistic)
        if name in ("tx", "rotation"):
            value = torch.eye(statistic.shape[-1]).expand_as(statistic)
        init.copy_(statistic, value)
