"""From one image of any size to logits of that size: a sliding window, or the image at once."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .config import SegmentationConfig

# float images in [0, 1] (B, 3, H, W) -> features (B, h*w, C), row-major, and their grid (h, w)
Encoder = Callable[[torch.Tensor], tuple[torch.Tensor, tuple[int, int]]]
Head = Callable[[torch.Tensor], torch.Tensor]  # features (B, C, h, w) -> logits (B, K, h, w)

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def encode_grid(encode: Encoder, images: torch.Tensor, mixed_precision: str = "no") -> torch.Tensor:
    """Images (B, 3, H, W) -> features as maps, float32 (B, C, h, w).

    Args:
        mixed_precision: autocast around `encode`. It does not reach a `Teacher`, which computes in its own dtype.

    Raises:
        ValueError: features that are not (B, h*w, C) of the grid that comes with them, or not finite.
    """
    with torch.autocast(images.device.type, AUTOCAST.get(mixed_precision), enabled=mixed_precision != "no"):
        features, (rows, columns) = encode(images)
    if features.ndim != 3 or features.shape[:2] != (len(images), rows * columns):
        raise ValueError(
            f"encode returned features {tuple(features.shape)} and the grid {(rows, columns)} for {len(images)} "
            f"images; expected ({len(images)}, {rows * columns}, C): one row per patch, without class tokens."
        )
    if not features.isfinite().all():
        raise ValueError("encode returned NaN or infinite features; check the weights, or use a wider dtype.")
    # (B, h*w, C) -> (B, C, h*w) -> (B, C, h, w)
    return features.float().transpose(1, 2).unflatten(2, (rows, columns)).contiguous()


@torch.no_grad()
def image_logits(encode: Encoder, head: Head, image: torch.Tensor, config: SegmentationConfig) -> torch.Tensor:
    """float (3, H, W) in [0, 1] -> logits (K, H, W), by `config.test_mode`."""
    height, width = image.shape[1:]
    if config.test_mode == "slide":
        # an image with a side below the window is black on the right and below, as in training
        side = config.crop_size
        image = F.pad(image, (0, max(side - width, 0), 0, max(side - height, 0)))
        return _slide(encode, head, image, config)[:, :height, :width]
    if config.whole_fit == "pad":
        bottom, right = -height % config.size_divisor, -width % config.size_divisor
        image = F.pad(image, (0, right, 0, bottom))
        return _window_logits(encode, head, image[None], config)[0, :, :height, :width]
    fitted = [max(1, round(side / config.size_divisor)) * config.size_divisor for side in (height, width)]
    image = F.interpolate(image[None], size=fitted, mode="bilinear", align_corners=False)
    logits = _window_logits(encode, head, image, config)
    return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)[0]


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of at least `window`: every `stride`, the last one flush with the end."""
    steps = -(-(length - window) // stride)  # rounded up
    return [min(step * stride, length - window) for step in range(steps + 1)]


def _slide(encode: Encoder, head: Head, image: torch.Tensor, config: SegmentationConfig) -> torch.Tensor:
    """(3, H, W), sides of at least crop_size -> (K, H, W): where windows overlap, the mean of their logits."""
    side = config.crop_size
    corners = [
        (top, left)
        for top in window_starts(image.shape[1], side, config.stride)
        for left in window_starts(image.shape[2], side, config.stride)
    ]
    windows = torch.stack([image[:, top : top + side, left : left + side] for top, left in corners])
    logits = [_window_logits(encode, head, some, config) for some in windows.split(config.batch_size)]
    total = image.new_zeros(logits[0].shape[1], *image.shape[1:])
    count = image.new_zeros(image.shape[1:])
    for (top, left), window in zip(corners, torch.cat(logits), strict=True):
        total[:, top : top + side, left : left + side] += window
        count[top : top + side, left : left + side] += 1
    return total / count


def _window_logits(encode: Encoder, head: Head, images: torch.Tensor, config: SegmentationConfig) -> torch.Tensor:
    """(B, 3, H, W) -> (B, K, H, W)."""
    logits = head(encode_grid(encode, images, config.mixed_precision)).float()
    return F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
