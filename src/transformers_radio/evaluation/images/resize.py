"""Three ways to bring an image to a size. All are bicubic and return uint8 (3, H, W)."""

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

Size = tuple[int, int]  # (height, width) in pixels


def stretch_image(image: Image.Image, size: Size) -> torch.Tensor:
    """The whole RGB image at exactly this size; its aspect ratio is lost."""
    height, width = size
    return _to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))


def cover_image(image: Image.Image, size: Size) -> torch.Tensor:
    """An RGB image, scaled until it covers this size, and the center cut out; its aspect ratio stays."""
    height, width = size
    return _to_tensor(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


def resize_shortest(image: Image.Image, side: int, step: int) -> torch.Tensor:
    """An RGB image whose shortest side becomes `side` pixels.

    The aspect ratio stays, but for what it takes to round height and width to multiples of `step`.
    """
    scale = side / min(image.size)
    width, height = (max(1, round(length * scale / step)) * step for length in image.size)
    return stretch_image(image, (height, width))


def _to_tensor(image: Image.Image) -> torch.Tensor:
    # contiguous: a batch of channels-last images would reach the encoder channels-last, and other kernels round
    # differently
    return pil_to_tensor(image).contiguous()
