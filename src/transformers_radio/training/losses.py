"""The distillation losses of AM-RADIO (paper section 3.4, equations 1 to 3), one value an image, all in float32."""

import torch
import torch.nn.functional as F


def cosine_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Each image's mean of 1 - cos(prediction, target) along the last dimension (L_cos in equations 1 and 2).

    Args:
        prediction, target: (B, ..., C), any floating dtype.

    Returns:
        float32 (B,) in [0, 2].
    """
    cosine = F.cosine_similarity(prediction.float(), target.float(), dim=-1, eps=1e-8)  # (B, ...)
    return 1 - cosine.flatten(1).mean(dim=1) if cosine.ndim > 1 else 1 - cosine


def match_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    cosine_weight: float = 0.9,
    smooth_l1_weight: float = 0.1,
    smooth_l1_beta: float = 2.0,
) -> torch.Tensor:
    """Equation 2 for each image: cosine for the direction, smooth L1 for the magnitude of the feature vectors.

    Args:
        prediction, target: (B, N, C) features on the same grid, any floating dtype.
        cosine_weight, smooth_l1_weight: the paper's alpha = 0.9 and beta = 0.1.
        smooth_l1_beta: where smooth L1 turns from quadratic to linear. The paper does not give it; 2.0 is what a later
            NVIDIA trainer uses.

    Returns:
        float32 (B,), >= 0.
    """
    smooth_l1 = F.smooth_l1_loss(prediction.float(), target.float(), beta=smooth_l1_beta, reduction="none")
    smooth_l1 = smooth_l1.flatten(1).mean(dim=1)  # (B, N, C) -> (B,)
    return cosine_weight * cosine_loss(prediction, target) + smooth_l1_weight * smooth_l1


def resize_grid(features: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Bilinearly resizes row-major features (B, h*w, C) on `grid` (h, w) to (B, H*W, C) on `size` (H, W), in float32.

    The centres of the outer cells do not move to the image's border (align_corners=False): both grids cover one crop.
    """
    if grid == size:
        return features.float()
    batch, _, channels = features.shape
    maps = features.float().transpose(1, 2).reshape(batch, channels, *grid)  # (B, h*w, C) -> (B, C, h, w)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H*W, C)


def common_grid(student: tuple[int, int], teacher: tuple[int, int], which: str = "larger") -> tuple[int, int]:
    """The grid on which features are compared: the larger of the two (paper section 4, resolution mismatch), or the
    smaller, which is cheaper and asks nothing of the student that the teacher does not resolve."""
    choose = max if which == "larger" else min
    return choose(student[0], teacher[0]), choose(student[1], teacher[1])
