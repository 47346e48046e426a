"""Pictures of dense features: three principal components shown as red, green and blue."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Vision transformers have a few high-norm artifact patches (about 2% in DINOv2-g) that would take over the basis.
OUTLIER_SHARE = 0.03
CLIP_PERCENTILES = (1.0, 99.0)


@dataclass
class PcaBasis:
    """Three directions and their color scale, all float64 on the CPU.

    Attributes:
        mean: (C,).
        directions: (C, 3), the strongest first.
        low, high: (3,), the components whose color is 0 and 1.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def colors(self, features: torch.Tensor) -> torch.Tensor:
        """(patches, C) -> float32 (patches, 3) in [0, 1].

        Raises:
            ValueError: features of another width than the basis.
        """
        if features.shape[1:] != self.mean.shape:
            raise ValueError(f"The features are {features.shape[1]} wide, but their basis is {len(self.mean)} wide.")
        components = (features.detach().double().cpu() - self.mean) @ self.directions
        # A component without spread (constant features) becomes black instead of amplified rounding errors.
        return ((components - self.low) / (self.high - self.low).clamp(min=1e-9)).clamp(0, 1).float()


def fit_pca(features: Sequence[torch.Tensor]) -> PcaBasis:
    """The basis and the color scale of all these patches together, each (patches, C) with C >= 3.

    The basis leaves out the 3% of patches farthest from the median, each component's scale is its 1st to 99th
    percentile, and its sign makes its largest loading positive, so that the same features always give the same basis.

    Raises:
        ValueError: NaN or infinite features.
    """
    patches = torch.cat([feature.detach().double().cpu() for feature in features])  # (all patches, C)
    if not patches.isfinite().all():
        raise ValueError("The features hold NaN or infinite values; check the model that produced them.")
    distance = (patches - patches.median(dim=0).values).norm(dim=1)
    inliers = patches[distance <= distance.quantile(1 - OUTLIER_SHARE)]
    mean = inliers.mean(dim=0)
    _, directions = torch.linalg.eigh((inliers - mean).T @ (inliers - mean))  # ascending eigenvalues
    basis = directions[:, -3:].flip(1)  # (C, 3), the strongest first
    basis = basis * basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    components = (patches - mean) @ basis
    low, high = (components.quantile(p / 100, dim=0) for p in CLIP_PERCENTILES)
    return PcaBasis(mean, basis, low, high)


def pca_rgb(
    features: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]], basis: PcaBasis | None = None
) -> list[torch.Tensor]:
    """Three principal components of the patches of all images as colors: per image float32 (h, w, 3) in [0, 1].

    One basis and one color scale serve all the images, so that equal colors mean equal content.

    Args:
        features: per image (h * w, C), row-major, C >= 3.
        grids: per image (h, w).
        basis: of other features in the same space, such as a teacher's; None for their own, see `fit_pca`.

    Raises:
        ValueError: features that do not fit their grids or the basis, or that are not finite.
    """
    if not features or len(features) != len(grids):
        raise ValueError(f"Expected one grid per image and at least one image; got {len(features)} and {len(grids)}.")
    for feature, (h, w) in zip(features, grids, strict=True):
        if feature.ndim != 2 or feature.shape[0] != h * w or feature.shape[1] < 3:
            raise ValueError(f"The features are {tuple(feature.shape)}; expected ({h} * {w}, C) with C >= 3.")
    basis = fit_pca(features) if basis is None else basis
    return [
        basis.colors(feature).reshape(h, w, 3)  # (h * w, 3) -> (h, w, 3)
        for feature, (h, w) in zip(features, grids, strict=True)
    ]
