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
        place = self._patch_numbers(tokens.device)
        # by arithmetic: reshapes branch on the shape, which an exported model would then be fixed to
        window, inside = place // self.size**2, place % self.size**2
        row = window // self.cols * self.size + inside // self.size
        col = window % self.cols * self.size + inside % self.size
        return tokens.index_select(1, self._behind_prefix(row * self.cols * self.size + col))

    def unsort(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `sort`."""
        return tokens.index_select(1, self._places_when_sorted(tokens.device))

    def unsort_attention(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of a global block, `(B, heads, L, L)`, in the order of the image; of a windowed block unchanged."""
        if self.is_split:
            return weights
        places = self._places_when_sorted(weights.device)
        return weights.index_select(2, places).index_select(3, places)

    def _places_when_sorted(self, device: torch.device) -> torch.Tensor:
        """`(prefix + h*w,)`: where each token of the image sits among the sorted ones."""
        patch = self._patch_numbers(device)
        row, col = patch // (self.cols * self.size), patch % (self.cols * self.size)
        window = row // self.size * self.cols + col // self.size
        inside = row % self.size * self.size + col % self.size
        return self._behind_prefix(window * self.size**2 + inside)

    def _patch_numbers(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.rows * self.size * self.cols * self.size, device=device)

    def _behind_prefix(self, patches: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.arange(self.num_prefix, device=patches.device), patches + self.num_prefix])

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(B, prefix + h*w, D)`, sorted -> `(B * windows, [prefix +] W*W, D)`."""
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        # (B, h*w, D) -> (B, windows, W*W, D)
        windows = patches.clone(memory_format=torch.contiguous_format).unflatten(1, (self.rows * self.cols, -1))
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
