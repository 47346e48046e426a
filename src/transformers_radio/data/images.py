"""From the bytes of an image file to one random crop at several resolutions.

Whatever the file holds becomes 8-bit RGB, upright: EXIF orientation is applied, greyscale, palette and CMYK are
converted, 16-bit greyscale is scaled to 8 bit, and transparency is composited on white. Colour profiles are ignored,
as in the preprocessing of CLIP, DINOv2 and SAM. Of an animation the first frame is used.
"""

import io
import math
import struct

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

Image.init()
# Raster formats only: the others that Pillow knows include ones that start programs (EPS) or are no photographs.
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
# MPO (several JPEGs in one file, as stereo cameras write) is opened by the JPEG plugin.
EXTENSIONS = tuple(
    sorted(extension for extension, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO"))
)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG besides the critical ones that say something about its pixels.
PNG_CHUNKS = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
EXIF_ORIENTATION = 0x0112
# EXIF orientation -> what brings the stored pixels upright (1, or anything else: nothing).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class SkippedImage(Exception):
    """An image that cannot be used. `reason` is what the skip counters are kept by."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode_rgb(data: bytes) -> Image.Image:
    """Decode a whole image file to an upright RGB image.

    Raises:
        SkippedImage: with reason `missing`, `undecodable`, `truncated`, `too large` or `unsupported mode ...`.
    """
    return _load_rgb(_open(data))


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
        (left, top, right, bottom) in whole pixels, inside the image. When no box of the wanted shape fits after ten
        draws (very long images), the largest centred box within `ratio`.
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
    data: bytes,
    resolutions: list[int],
    generator: np.random.Generator,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    horizontal_flip: bool = False,
    min_side: int = 1,
) -> dict[int, Tensor]:
    """One random crop of an image file, resized from the file's own pixels to every resolution.

    Returns:
        resolution r -> uint8 tensor (3, r, r), RGB, channels last in memory. All show the same crop.

    Raises:
        SkippedImage: the file cannot be used.
    """
    image = _open(data)
    width, height = image.size
    if min(width, height) < min_side:
        raise SkippedImage("too small")
    box = random_crop(_upright_size(image), generator, crop_scale, crop_ratio)
    flip = horizontal_flip and generator.random() < 0.5

    # A JPEG decoder can return 1/2, 1/4 or 1/8 of the size for a fraction of the work (it leaves out high DCT
    # frequencies). Taken only as far as the crop still has at least as many pixels as the largest resolution.
    shrink = min(box[2] - box[0], box[3] - box[1]) / max(resolutions)
    factor = next(factor for factor in (8, 4, 2, 1) if factor <= max(shrink, 1))
    if factor > 1 and image.draft(None, (width // factor, height // factor)) is None:
        factor = 1  # not a JPEG
    # Outwards to whole pixels of the smaller image, so that the crop never loses any.
    box = (box[0] // factor, box[1] // factor, -(-box[2] // factor), -(-box[3] // factor))

    crop = F.pil_to_tensor(_load_rgb(image).crop(box))  # (3, h, w)
    if flip:
        crop = crop.flip(2)
    # torchvision's antialiased resize of uint8 returns what Pillow's does (up to rounding) in a third of the time.
    return {r: F.resize(crop, [r, r], InterpolationMode.BICUBIC, antialias=True) for r in resolutions}


def _open(data: bytes) -> Image.Image:
    """Read the header only, of a PNG all of it: what Pillow refuses may lie behind the pixels."""
    if data.startswith(PNG_SIGNATURE):
        try:
            image = _open_file(data)
            _load(image)
            return image
        except SkippedImage:  # Pillow gives up over long comments and profiles, or a damaged one
            data = _only_pixels(data)
    return _open_file(data)


def _only_pixels(png: bytes) -> bytes:
    """The file without texts, colour profiles and the like."""
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start + 8 <= len(png):
        length, name = struct.unpack_from(">I4s", png, start)
        end = start + 12 + length  # length, name, content, checksum
        if name[:1].isupper() or name in PNG_CHUNKS:  # upper case: a reader has to understand it
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def _open_file(data: bytes) -> Image.Image:
    if not data:
        raise SkippedImage("missing")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise SkippedImage("too large") from None
    except Exception:  # plugins raise whatever a damaged header leads them to
        raise SkippedImage("undecodable") from None


def _orientation(image: Image.Image) -> int:
    if image.format not in ("JPEG", "MPO"):
        _load(image)  # other formats may keep EXIF behind the pixels
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing against the pixels
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _load(image: Image.Image) -> None:
    # Other libraries set this switch of Pillow's for the whole process; half a picture is no training image.
    allow_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image.load()
    except Exception as error:
        raise SkippedImage("truncated" if "truncated" in str(error) else "undecodable") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated


def _load_rgb(image: Image.Image) -> Image.Image:
    _load(image)
    orientation = _orientation(image)
    try:
        if image.mode == "I" or image.mode.startswith("I;16"):
            levels = np.asarray(image).astype(np.int64)
            if levels.max() > 65535 or levels.min() < 0:
                raise SkippedImage("unsupported mode I")
            rgb = Image.fromarray((levels // 257).astype(np.uint8)).convert("RGB")
        elif image.mode == "F":
            raise SkippedImage("unsupported mode F")  # the range of floating-point pixels is anybody's guess
        elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            rgb = Image.new("RGB", rgba.size, (255, 255, 255))
            rgb.paste(rgba, mask=rgba.getchannel("A"))
        else:
            rgb = image if image.mode == "RGB" else image.convert("RGB")
    except ValueError:
        raise SkippedImage(f"unsupported mode {image.mode}") from None
    rgb = rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb
    rgb.info.pop("exif", None)  # or whoever reads the orientation there would turn the image again
    return rgb
