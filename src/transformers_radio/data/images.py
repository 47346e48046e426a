"""From the bytes of an image file to one random crop at several resolutions.

Whatever the file holds becomes upright 8-bit RGB: EXIF orientation is applied; grayscale, palette and CMYK are
converted; 16-bit grayscale is scaled to 8 bit; transparency is composited on white. Color profiles are ignored, as in
the preprocessing of CLIP, DINOv2 and SAM. The first frame of an animation is used.
"""

import math

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from transformers_radio.modeling.decoding_radio import FORMATS as FORMATS
from transformers_radio.modeling.decoding_radio import SkippedImage as SkippedImage
from transformers_radio.modeling.decoding_radio import decode_rgb as decode_rgb
from transformers_radio.modeling.decoding_radio import load_rgb, open_image, orientation_of

from .config import DataConfig

# MPO (several JPEGs in one file, as stereo cameras write) is opened by the JPEG plugin.
EXTENSIONS = tuple(
    sorted(extension for extension, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))
)


def random_crop(
    size: tuple[int, int], generator: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw a box that covers a share `scale` of the area with a width/height ratio in `ratio` (log-uniform).

    Args:
        size: (width, height) of the image in pixels.
        generator: the only source of randomness.
        scale: smallest and largest share of the area, in (0, 1].
        ratio: smallest and largest width / height.

    Returns:
        (left, top, right, bottom) in whole pixels, inside the image. If none of ten drawn boxes fits (in a very long
        image), the largest centered box within `ratio`.
    """
    width, height = size
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(0, width - w + 1))
            top = int(generator.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def load_crops(
    data: bytes, resolutions: list[int], generator: np.random.Generator, config: DataConfig
) -> dict[int, Tensor]:
    """One random crop of an image file, resized from the file's own pixels to every resolution.

    Args:
        config: its `crop_scale`, `crop_ratio`, `horizontal_flip`, `min_side` and `max_pixels` are used.

    Returns:
        resolution r -> uint8 tensor (3, r, r), RGB, channels last in memory. All show the same crop.

    Raises:
        SkippedImage: the file cannot be used.
    """
    image = open_image(data, config.max_pixels)
    width, height = image.size
    if min(width, height) < config.min_side:
        raise SkippedImage("too small")
    box = random_crop(_upright_size(image), generator, config.crop_scale, config.crop_ratio)
    flip = config.horizontal_flip and generator.random() < 0.5

    # A JPEG decoder can return 1/2, 1/4 or 1/8 of the size for a fraction of the work (it leaves out high DCT
    # frequencies). Taken only as far as the crop still has at least as many pixels as the largest resolution.
    shrink = min(box[2] - box[0], box[3] - box[1]) / max(resolutions)
    factor = next(factor for factor in (8, 4, 2, 1) if factor <= max(shrink, 1))
    if factor > 1 and image.draft(None, (width // factor, height // factor)) is None:
        factor = 1  # not a JPEG
    # Outwards to whole pixels of the smaller image, so that the crop never loses any.
    box = (box[0] // factor, box[1] // factor, -(-box[2] // factor), -(-box[3] // factor))

    image = load_rgb(image).crop(box)  # under the same name, so that memory does not hold the whole image as well
    crop = F.pil_to_tensor(image)  # (3, h, w)
    if flip:
        crop = crop.flip(2)
    # torchvision's antialiased resize of uint8 returns what Pillow's does (up to rounding) in a third of the time.
    return {r: F.resize(crop, [r, r], InterpolationMode.BICUBIC, antialias=True) for r in resolutions}


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if orientation_of(image) in (5, 6, 7, 8) else (width, height)
