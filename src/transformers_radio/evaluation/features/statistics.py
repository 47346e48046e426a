"""What features and position tables look like inside: outlier patches, odd channels, noise, agreement of two grids."""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

# what libraries call a learned table of absolute positions; relative ones (rel_pos_h, ...) have other names
POSITION_NAME = re.compile(r"(^|[._])pos(ition|itional)?_?embed(ding|dings)?(\.weight)?$")
MAX_PREFIX_TOKENS = 16  # class and register tokens that a table may hold besides a square grid
HALF_NYQUIST = 0.25  # cycles per patch; a grid of patches carries up to 0.5
DEAD_SHARE = 1e-4  # a channel whose deviation is below this share of the median channel's is dead


def feature_cosine(
    first: torch.Tensor, first_grid: tuple[int, int], second: torch.Tensor, second_grid: tuple[int, int]
) -> torch.Tensor:
    """Mean cosine of the patches of two encodings of the same images, (B,).

    Both are resized to the coarser of the grids, side by side: bilinear, with antialiasing where it shrinks.

    Args:
        first, second: (B, h*w, C), row-major, of one width C; their grids (h, w).
    """
    if first.shape[0] != second.shape[0] or first.shape[2] != second.shape[2]:
        raise ValueError(f"Features {tuple(first.shape)} and {tuple(second.shape)} must have one B and one C.")
    grid = min(first_grid[0], second_grid[0]), min(first_grid[1], second_grid[1])
    maps = []
    for features, own in ((first, first_grid), (second, second_grid)):
        # (B, h*w, C) -> (B, C, h, w)
        maps.append(_resize(features.float().transpose(1, 2).unflatten(2, own), grid))
    return F.cosine_similarity(maps[0], maps[1], dim=1).mean(dim=(1, 2))


def _resize(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, *grid)"""
    if tuple(maps.shape[2:]) == grid:
        return maps
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False, antialias=True)


@dataclass
class PatchNorms:
    """L2 norms of patch tokens."""

    norms: torch.Tensor  # float64 (N, h, w)
    median: float  # of the norms
    p99: float  # their 99th percentile
    threshold: float  # a patch above it is an outlier

    @property
    def positions(self) -> torch.Tensor:
        """(h, w): the share of the images in which each patch is an outlier."""
        return (self.norms > self.threshold).double().mean(dim=0)

    @property
    def share(self) -> float:
        """The share of outliers among all patches, 0 to 1."""
        return self.positions.mean().item()

    @property
    def border_share(self) -> float:
        """The share of the outliers that are in the outermost rows and columns, 0 to 1; NaN without outliers."""
        positions = self.positions
        return (1 - positions[1:-1, 1:-1].sum() / positions.sum()).item()

    def most_frequent(self, count: int) -> list[tuple[int, int, float]]:
        """(row, column, share of the images) of up to `count` patches that are outliers most often."""
        positions = self.positions
        shares, places = positions.flatten().sort(descending=True, stable=True)
        columns = positions.shape[1]
        found = zip(places[:count].tolist(), shares[:count].tolist(), strict=True)
        return [(place // columns, place % columns, share) for place, share in found if share > 0]


def patch_norms(features: torch.Tensor, grid: tuple[int, int], factor: float = 3.0) -> PatchNorms:
    """Norms of patches, and the outliers: those above `factor` times the median.

    Large vision transformers keep global facts in a few patches of high norm, which spoil dense uses
    (Darcet et al. 2024, "Vision Transformers Need Registers").

    Args:
        features: (N, h*w, C), row-major.
        factor: above 1.
    """
    if features.ndim != 3 or features.shape[1] != grid[0] * grid[1] or len(features) == 0:
        raise ValueError(f"The features are {tuple(features.shape)}; expected (N, {grid[0]} * {grid[1]}, C), N >= 1.")
    if factor <= 1:
        raise ValueError(f"factor is {factor}; expected more than 1, times the median norm.")
    norms = torch.stack([image.double().norm(dim=1) for image in features])  # (N, h*w)
    if not norms.isfinite().all():
        raise ValueError("The features hold NaN or infinite values; check the model that produced them.")
    ascending = norms.flatten().sort().values
    median = _quantile(ascending, 0.5)
    # (N, h*w) -> (N, h, w)
    return PatchNorms(norms.unflatten(1, grid), median, _quantile(ascending, 0.99), factor * median)


def _quantile(ascending: torch.Tensor, share: float) -> float:
    """Linear between neighbors, as numpy; `torch.quantile` refuses more than 16 million values."""
    place = share * (len(ascending) - 1)
    low, high = math.floor(place), math.ceil(place)
    return torch.lerp(ascending[low], ascending[high], place - low).item()


@dataclass
class ChannelStatistics:
    """Statistics of each channel over all patches of all images, float64 (C,)."""

    mean: torch.Tensor
    std: torch.Tensor  # of the population
    rms: torch.Tensor  # root of the mean square
    kurtosis: torch.Tensor  # excess (0 for a normal distribution); NaN in a dead channel
    dead: torch.Tensor  # bool (C,): std below 1e-4 of the median channel's

    @property
    def largest(self) -> int:
        """The channel with the largest rms."""
        return int(self.rms.argmax())

    @property
    def largest_ratio(self) -> float:
        """The largest channel's rms over the median channel's; far above 1 is a "massive activation"."""
        return (self.rms.max() / self.rms.median()).item()


def channel_statistics(features: torch.Tensor) -> ChannelStatistics:
    """Moments of each channel.

    Args:
        features: (N, h*w, C) or (patches, C).
    """
    patches = features.flatten(0, -2)  # (N, h*w, C) -> (N*h*w, C)
    if len(patches) < 2:
        raise ValueError(f"The features are {tuple(features.shape)}; expected at least two patches.")
    mean = patches.mean(dim=0, dtype=torch.float64)
    second, fourth = torch.zeros_like(mean), torch.zeros_like(mean)
    for chunk in patches.split(65536):  # in float64 around the mean, a part at a time
        square = (chunk.double() - mean).square_()
        second += square.sum(dim=0)
        fourth += square.square_().sum(dim=0)
    variance = second / len(patches)
    std = variance.sqrt()
    dead = std <= DEAD_SHARE * std.median()
    kurtosis = (fourth / len(patches) / variance.square() - 3).masked_fill(dead, math.nan)
    return ChannelStatistics(mean, std, (mean.square() + variance).sqrt(), kurtosis, dead)


def position_table(model: nn.Module) -> torch.Tensor | None:
    """The learned absolute positions of a vision transformer, float32 (h, w, D) on the CPU; None where there are none.

    Rotary and relative positions, and convolutions, have no table. Class and register tokens in front of the grid are
    dropped. If there are several tables, it is the one with the most positions.
    """
    tables = [
        table
        for name, parameter in model.named_parameters()
        if POSITION_NAME.search(name) and (table := _as_grid(parameter.detach())) is not None
    ]
    return max(tables, key=lambda table: table.shape[:2].numel()).float().cpu() if tables else None


def _as_grid(table: torch.Tensor) -> torch.Tensor | None:
    if table.ndim == 4 and len(table) == 1:
        return table[0]  # (1, h, w, D), SAM's
    if table.ndim == 3 and len(table) == 1:
        table = table[0]  # (1, n, D) -> (n, D)
    if table.ndim != 2:
        return None
    side = math.isqrt(len(table))
    prefix = len(table) - side**2
    if side < 2 or prefix > MAX_PREFIX_TOKENS:
        return None
    return table[prefix:].unflatten(0, (side, side))  # (prefix + side*side, D) -> (side, side, D)


def position_noise(table: torch.Tensor) -> float:
    """The share of a position table's energy in fast changes from patch to patch, 0 to 1.

    With X_c the orthonormal two-dimensional cosine transform (DCT-II) of channel c, without its constant term, and
    f(u, v) = sqrt((u / 2h)^2 + (v / 2w)^2) the frequency of a coefficient in cycles per patch:

        noise = sum of X_c(u, v)^2 over c and f > 1/4  /  sum of X_c(u, v)^2 over c and all (u, v) but (0, 0)

    A smooth table has about 0; white noise has the share of the coefficients with f > 1/4, about 1 - pi/16 = 0.80.
    The cosine transform, unlike Fourier's, does not mistake the jump between opposite borders for noise. The paper
    shows this noise as a picture (Figure 3) and states no formula; this one is ours.

    Args:
        table: (h, w, D), h and w at least 2, not constant.
    """
    if table.ndim != 3 or min(table.shape[:2]) < 2:
        raise ValueError(f"The table is {tuple(table.shape)}; expected (h, w, D) with at least 2 x 2 positions.")
    rows, columns = table.shape[:2]
    transformed = torch.einsum("ui,ijc,vj->uvc", _cosines(rows), table.double(), _cosines(columns))
    energy = transformed.square().sum(dim=2)  # (h, w)
    constant = energy[0, 0].item()
    energy[0, 0] = 0
    if energy.sum() <= 1e-20 * constant:  # no more than rounding
        raise ValueError("The table is constant, so it has neither signal nor noise.")
    u, v = torch.arange(rows)[:, None] / (2 * rows), torch.arange(columns) / (2 * columns)
    return (energy[(u.square() + v.square()).sqrt() > HALF_NYQUIST].sum() / energy.sum()).item()


def _cosines(size: int) -> torch.Tensor:
    """Orthonormal DCT-II as a matrix, float64 (frequencies, places)."""
    frequency, place = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = (math.pi * frequency * (place + 0.5) / size).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
