"""ViTDet windows over one patch grid."""

import torch


class RadioWindows:
    """Windows of `size` x `size` patches (paper, appendix on ViTDet), for one forward pass.

    Patches are sorted window by window ONCE, so that going in and out of windows is a reshape; blocks with global
    attention do not care about the order. CLS and register tokens bypass windowed blocks unchanged, or (`average`)
    are copied into every window and averaged when the windows are joined.

    Args:
        grid (`tuple[int, int]`): Rows and columns of the patch grid, multiples of `size`.
        num_prefix (`int`): CLS and register tokens in front of the patches.
    """

    def __init__(self, grid: tuple[int, int], size: int, num_prefix: int, average: bool):
        self.rows, self.cols, self.size = grid[0] // size, grid[1] // size, size
        self.num_prefix, self.average = num_prefix, average
        self.is_split = False
        self.bypassing = torch.empty(0)

    def sort(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, prefix + h*w, D)`, patches row by row -> the same, patches window by window."""
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        # (B, h*w, D) -> (B, h/W, W, w/W, W, D) -> (B, h/W, w/W, W, W, D) -> (B, h*w, D)
        patches = patches.unflatten(1, (self.rows, self.size, self.cols, self.size)).transpose(2, 3).flatten(1, 4)
        return torch.cat([prefix, patches], dim=1)

    def unsort(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `sort`."""
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        # (B, h*w, D) -> (B, h/W, w/W, W, W, D) -> (B, h/W, W, w/W, W, D) -> (B, h*w, D)
        patches = patches.unflatten(1, (self.rows, self.cols, self.size, self.size)).transpose(2, 3).flatten(1, 4)
        return torch.cat([prefix, patches], dim=1)

    def unsort_attention(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of a global block, `(B, heads, L, L)`, in the order of the image; of a windowed block unchanged."""
        if self.is_split:
            return weights
        # (L,) -> (1, L, 1) -> (L,): where each token of the image sits among the sorted ones
        index = self.unsort(torch.arange(weights.shape[-1], device=weights.device)[None, :, None])[0, :, 0]
        return weights[:, :, index][..., index]

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, prefix + h*w, D)`, sorted -> `(B * windows, [prefix +] W*W, D)`."""
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        # (B, h*w, D) -> (B, windows, W*W, D)
        windows = patches.unflatten(1, (-1, self.size**2))
        if self.average:
            # (B, prefix, D) -> (B, windows, prefix, D)
            prefix = prefix.unsqueeze(1).expand(-1, windows.shape[1], -1, -1)
            windows = torch.cat([prefix, windows], dim=2)
        else:
            self.bypassing = prefix
        # (B, windows, L, D) -> (B*windows, L, D)
        return windows.flatten(0, 1)

    def join(self, windows: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        # (B*windows, L, D) -> (B, windows, L, D)
        windows = windows.unflatten(0, (-1, self.rows * self.cols))
        if self.average:
            prefix, windows = windows[:, :, : self.num_prefix].mean(1), windows[:, :, self.num_prefix :]
        else:
            prefix = self.bypassing
        # (B, windows, W*W, D) -> (B, h*w, D)
        return torch.cat([prefix, windows.flatten(1, 2)], dim=1)

    def arrange(self, tokens: torch.Tensor, windowed: bool) -> torch.Tensor:
        """Sorted tokens as the next block needs them, split or joined."""
        if windowed != self.is_split:
            tokens = self.split(tokens) if windowed else self.join(tokens)
            self.is_split = windowed
        return tokens

    def to_image(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens between two blocks, split or joined -> `(B, prefix + h*w, D)`, row by row."""
        return self.unsort(self.join(tokens) if self.is_split else tokens)
