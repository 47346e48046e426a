"""From pixels to tokens: input conditioner, patches, cropped position embedding (CPE), CLS and register tokens."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .inputs_radio import in_function_transform

# log-uniform aspect ratio of a training crop of the position table
_CPE_RATIO = (3 / 4, 4 / 3)
_MAX_CACHED_TABLES = 16


class RadioInputConditioner(nn.Module):
    """`(pixels - mean) / std` per channel; in float32, the result in the dtype of the pixels.

    The statistics stay in float32 when the model is cast: half precision would round them.
    """

    def __init__(self, config):
        super().__init__()
        # (3,) -> (3, 1, 1)
        self.norm_mean = nn.Buffer(torch.tensor(config.norm_mean, dtype=torch.float32).view(-1, 1, 1))
        self.norm_std = nn.Buffer(torch.tensor(config.norm_std, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        normalized = (pixel_values.float() - self.norm_mean.float()) / self.norm_std.float()
        return normalized.to(pixel_values.dtype)

    def _apply(self, fn, recurse=True):
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, statistic in exact.items():
            moved = getattr(self, name)
            if moved.dtype != statistic.dtype:  # a cast: keep its device alone
                setattr(self, name, statistic.to(moved.device))
        return self


class RadioExternalConditioner(RadioInputConditioner, nn.Identity):
    """Stands in for a conditioner that was handed over: keeps its statistics for the state dict, changes no pixel."""

    def __init__(self, conditioner: nn.Module):
        nn.Module.__init__(self)
        for name, statistic in conditioner.named_buffers():
            self.register_buffer(name, statistic.clone())

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values


class RadioPatchEmbeddings(nn.Module):
    """Patches and their positions, with the CLS and register tokens (no position) in front.

    Cropped position embedding (paper Sec. 4): while training, each image sees a random crop of the learned table,
    resampled to its grid; otherwise the table is resized to a square of the longer side and the top left is used.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.table_side = config.max_img_size // config.patch_size
        self.patch_projection = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, self.table_side**2, config.hidden_size))
        self.cls_register_token = nn.Parameter(
            torch.zeros(config.num_cls_tokens + config.num_registers, config.hidden_size)
        )
        self._cache: dict = {}
        self._cached_state: tuple = ()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, height, width)` -> `(batch, prefix + h * w, hidden)`."""
        p = self.config.patch_size
        batch, channels, height, width = pixel_values.shape
        rows, cols = height // p, width // p
        # (B, C, h*p, w*p) -> (B, C, h, p, w, p) -> (B, h, w, C, p, p) -> (B, h*w, C*p*p)
        patches = pixel_values.reshape(batch, channels, rows, p, cols, p).permute(0, 2, 4, 1, 3, 5)
        patches = self.patch_projection(patches.reshape(batch, rows * cols, channels * p * p))
        patches = patches + self.positions(batch, rows, cols, patches.dtype)
        # (prefix, D) -> (B, prefix, D)
        prefix = self.cls_register_token.expand(batch, -1, -1)
        return torch.cat([prefix, patches], dim=1)

    def forward_packed(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """`(total patches, C*p*p)` -> `(1, total length, hidden)`: prefix and patches of the images one by one."""
        patches = self.patch_projection(pixel_values)
        tokens = []
        images = patches.split([rows * cols for rows, cols in grids])
        for (rows, cols), image in zip(grids, images, strict=True):
            tokens += [self.cls_register_token, image + self.positions(1, rows, cols, image.dtype)[0]]
        return torch.cat(tokens).unsqueeze(0)

    def positions(self, batch: int, rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """Position embedding of a patch grid: `(1 or batch, rows * cols, hidden)`."""
        table = self.position_embedding
        if self.training:
            if self.config.cpe_sampling and (rows, cols) != (self.table_side, self.table_side):
                positions = self._sample_positions(batch, rows, cols)
            else:
                positions = self._resize_positions(rows, cols)
            if self.config.pos_dropout > 0:
                keep = torch.rand(batch, 1, 1, device=table.device) >= self.config.pos_dropout
                positions = positions * keep
            return positions.to(dtype)
        if self._cannot_cache():
            return self._resize_positions(rows, cols).to(dtype)
        # in-place writes raise the version; a new tensor has a new address, as long as the old one is held here
        state = (table._version, table.data_ptr(), table.dtype, table.device)
        if state != self._cached_state[:4] or len(self._cache) >= _MAX_CACHED_TABLES:
            self._cache.clear()
            self._cached_state = (*state, table.data)
        key = (rows, cols, dtype, torch.is_inference_mode_enabled())
        cached = self._cache.get(key)  # once: other threads may clear the cache
        if cached is None:
            cached = self._cache[key] = self._resize_positions(rows, cols).to(dtype)
        return cached

    def _cannot_cache(self) -> bool:
        table = self.position_embedding
        return (
            torch.compiler.is_compiling()
            or in_function_transform()  # the result may be a stand-in that ends with the transform
            or type(table) is not nn.Parameter  # a tensor in its place for one call (torch.func.functional_call)
            or (torch.is_grad_enabled() and table.requires_grad)  # the result carries a graph
            or type(table.data) is not torch.Tensor  # fake or sharded tensors
            or table.is_inference()  # has no version
        )

    def train(self, mode: bool = True):
        # writes through `.data` leave no trace in the version: a change of mode starts afresh
        self._forget_positions()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._forget_positions()  # a move or cast; the old table must not stay in memory
        return super()._apply(fn, recurse)

    def _forget_positions(self):
        self._cache.clear()
        self._cached_state = ()

    def _table(self) -> torch.Tensor:
        # (1, side*side, D) -> (1, D, side, side)
        return self.position_embedding.float().unflatten(1, (self.table_side, self.table_side)).permute(0, 3, 1, 2)

    def _resize_positions(self, rows: int, cols: int) -> torch.Tensor:
        side = max(rows, cols)
        table = F.interpolate(self._table(), size=(side, side), mode="bilinear", align_corners=False)
        # by indices: slices branch on whether they are the whole side, which would fix the aspect of an exported model
        top, left = (torch.arange(length, device=table.device) for length in (rows, cols))
        # (1, D, side, side) -> (1, side, side, D) -> (1, rows, cols, D) -> (1, rows*cols, D)
        return table.permute(0, 2, 3, 1).index_select(1, top).index_select(2, left).flatten(1, 2)

    def _sample_positions(self, batch: int, rows: int, cols: int) -> torch.Tensor:
        device = self.position_embedding.device
        grid = cpe_training_grid(batch, rows, cols, self.config.cpe_scale, device)
        # one table serves all images, so their grids are stacked along the height: a batch of tables would need
        # batch times the memory in the backward pass. (B, rows, cols, 2) -> (1, B*rows, cols, 2)
        grid = grid.reshape(1, batch * rows, cols, 2)
        positions = F.grid_sample(self._table(), grid, mode="bilinear", padding_mode="zeros", align_corners=True)
        # (1, D, B*rows, cols) -> (D, B, rows*cols) -> (B, rows*cols, D)
        return positions.reshape(-1, batch, rows * cols).permute(1, 2, 0)


def cpe_training_grid(
    batch: int, rows: int, cols: int, scale: list[float], device: torch.device | None = None
) -> torch.Tensor:
    """Sampling points of one random crop of the position table per image.

    Args:
        scale (`list[float]`): Smallest and largest area share of a crop. Its side is uniform between the roots.

    Returns:
        `torch.Tensor` of shape `(batch, rows, cols, 2)`: `(x, y)` in [-1, 1], for `grid_sample(align_corners=True)`.
        Drawn from the default generator of `device`.
    """
    draw = torch.rand(4, batch, 1, device=device)
    low, high = math.sqrt(scale[0]), math.sqrt(scale[1])
    side = low + (high - low) * draw[0]
    low, high = (math.log(ratio) for ratio in _CPE_RATIO)
    aspect = torch.exp(low + (high - low) * draw[1])
    width, height = (side * aspect).clamp(0, 1), (side / aspect).clamp(0, 1)
    left, top = (1 - width) * draw[2], (1 - height) * draw[3]
    x = left + width * torch.linspace(0, 1, cols, device=device)  # (B, cols)
    y = top + height * torch.linspace(0, 1, rows, device=device)  # (B, rows)
    # (B, cols) and (B, rows) -> (B, rows, cols, 2)
    grid = torch.stack([x[:, None, :].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, cols)], dim=-1)
    return 2 * grid - 1
