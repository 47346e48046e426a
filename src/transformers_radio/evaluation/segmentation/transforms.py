"""Image and label map together: resize, crop, flip, colors; the usual ADE20K pipeline of mmsegmentation."""

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from .config import SegmentationConfig
from .miou import IGNORE_INDEX

CROP_DRAWS = 10  # further draws after a crop with too much of one class


def fitted_size(height: int, width: int, long_side: int, short_side: int) -> tuple[int, int]:
    """(height, width) scaled until one of the two limits is reached; the shape stays."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_bilinear(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, *size). Bilinear without antialiasing: what OpenCV does for mmsegmentation."""
    return transforms.resize(image, list(size), InterpolationMode.BILINEAR, antialias=False)


def resize_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Integers (H, W) -> (*size), nearest."""
    return transforms.resize(mask[None], list(size), InterpolationMode.NEAREST)[0]


def training_sample(
    image: torch.Tensor,
    mask: torch.Tensor,
    config: SegmentationConfig,
    generator: np.random.Generator,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One augmented crop: uint8 (3, crop_size, crop_size) and int64 (crop_size, crop_size).

    Args:
        image: uint8 (3, H, W).
        mask: int64 (H, W), class indices or `ignore_index`.
        generator: the only source of randomness.
    """
    scale = generator.uniform(config.scale_min, config.scale_max)
    size = fitted_size(mask.shape[0], mask.shape[1], int(config.long_side * scale), int(config.short_side * scale))
    image, mask = resize_bilinear(image, size), resize_mask(mask, size)
    top, left = _choose_crop(mask, config, generator, ignore_index)
    image = image[:, top : top + config.crop_size, left : left + config.crop_size]
    mask = mask[top : top + config.crop_size, left : left + config.crop_size]
    if generator.random() < config.flip_probability:
        image, mask = image.flip(2), mask.flip(1)
    if config.photometric_distortion:
        image = distort_colors(image, generator)
    # an image smaller than the crop is black and without labels on the right and below
    missing = [0, config.crop_size - mask.shape[1], 0, config.crop_size - mask.shape[0]]
    return F.pad(image, missing), F.pad(mask, missing, value=ignore_index)


def _choose_crop(
    mask: torch.Tensor, config: SegmentationConfig, generator: np.random.Generator, ignore_index: int
) -> tuple[int, int]:
    """(top, left) of a crop with at least two classes, none of which has more than its share.

    After ten draws that fail, the next one is taken as it is.
    """
    side = config.crop_size
    for draw in range(1 + CROP_DRAWS):
        top = int(generator.integers(0, max(mask.shape[0] - side, 0) + 1))
        left = int(generator.integers(0, max(mask.shape[1] - side, 0) + 1))
        if config.max_class_share >= 1 or draw == CROP_DRAWS:
            break
        labels = mask[top : top + side, left : left + side]
        counts = torch.bincount(labels[labels != ignore_index])
        if (counts > 0).sum() > 1 and counts.max() / counts.sum() < config.max_class_share:
            break
    return top, left


def distort_colors(image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Photometric distortion of uint8 (3, H, W) as in SSD, in mmsegmentation's ranges; each with probability 1/2.

    Brightness +-32, contrast 0.5 to 1.5 (before or after the two that follow), saturation 0.5 to 1.5, hue +-18
    degrees. torchvision's RandomPhotometricDistort is another: it shuffles color channels as well.
    """
    if generator.random() < 0.5:
        image = (image.short() + round(generator.uniform(-32, 32))).clamp(0, 255).byte()
    contrast_first = generator.random() < 0.5
    # mmsegmentation's contrast multiplies pixels, which is what torchvision calls brightness
    contrast = generator.uniform(0.5, 1.5) if generator.random() < 0.5 else None
    if contrast is not None and contrast_first:
        image = transforms.adjust_brightness(image, contrast)
    if generator.random() < 0.5:
        image = transforms.adjust_saturation(image, generator.uniform(0.5, 1.5))
    if generator.random() < 0.5:
        image = transforms.adjust_hue(image, generator.uniform(-18, 18) / 360)
    if contrast is not None and not contrast_first:
        image = transforms.adjust_brightness(image, contrast)
    return image
