"""From an image file to upright 8-bit RGB: training and the image processor read the same pixels."""

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile

Image.init()
# Raster formats only: the others that Pillow knows include formats that start programs (EPS) or hold no photographs.
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
# Width x height of the largest image that is decoded: phone cameras make smaller ones; decoding takes up to 3 GB.
MAX_PIXELS = 120_000_000
# The file of an image with that many pixels is smaller.
MAX_BYTES = 2**31
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG besides the critical ones that say something about its pixels.
PNG_CHUNKS = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
# Chunks that may be damaged: they say nothing about the pixels. A damaged name is not among them.
PNG_NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs", b"tIME")
EXIF_ORIENTATION = 0x0112
# EXIF orientation -> what turns the stored pixels upright; with any other value they are upright already.
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
    """An image that cannot be used. Skipped images are counted by `reason`; the message says more."""

    def __init__(self, reason: str, detail: object = ""):
        super().__init__(" ".join(str(detail).split()) or reason)
        self.reason = reason


def read_file(path: str | os.PathLike) -> bytes:
    """The content of an image file on a disk.

    Raises:
        OSError: there is no such file, or it is a folder, a pipe or a device, which may have no end.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError("a folder, pipe or device, where a file is expected")
    if status.st_size > MAX_BYTES:
        raise FileNotFoundError(f"a file of {status.st_size / 1e9:.1f} GB, which is not an image")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


def decode_rgb(data: bytes) -> Image.Image:
    """Decode a whole image file to an upright RGB image.

    Raises:
        SkippedImage: with reason `missing`, `undecodable`, `truncated`, `too large` or `unsupported mode ...`.
    """
    return load_rgb(open_image(data))


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header only, but all of a PNG: what Pillow refuses may lie behind the pixels.

    Raises:
        SkippedImage: the file cannot be used.
    """
    if data.startswith(PNG_SIGNATURE):
        _check_png(data)
        try:
            image = _open(data, max_pixels)
            load_pixels(image)
            return image
        except SkippedImage as error:  # Pillow refuses comments and profiles that are long or damaged
            if error.reason == "too large":
                raise
            data = _only_pixels(data)
    return _open(data, max_pixels)


def load_rgb(image: Image.Image) -> Image.Image:
    """The pixels of an image as 8-bit RGB, upright, transparency laid over white.

    Raises:
        SkippedImage: the file is damaged, or the range of its pixels is not defined.
    """
    load_pixels(image)
    orientation = orientation_of(image)
    mode = image.mode
    try:
        image = _to_rgb(image)
    except SkippedImage:
        raise
    except Exception as error:  # conversions that Pillow lacks, or damaged palettes
        raise SkippedImage(f"unsupported mode {mode}", error) from None
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
        image.info = {}  # holds the orientation as EXIF or XMP: a reader would turn the image again
    return image


def load_pixels(image: Image.Image) -> None:
    """Decode the pixels of an open image, in place."""
    # Other libraries set this switch of Pillow for the whole process; half a picture must not be trained on.
    allow_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image.load()
    except Exception as error:  # plugins raise whatever a damaged file leads them to
        raise SkippedImage("truncated" if "truncated" in str(error) else "undecodable", error) from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated


def orientation_of(image: Image.Image) -> int:
    """The orientation of the stored pixels as in EXIF, 1 to 8; 1 is upright."""
    if image.format not in ("JPEG", "MPO"):
        load_pixels(image)  # other formats may keep EXIF behind the pixels
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # the pixels may be sound although the EXIF block is damaged
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if image.mode == "I" and (levels.min() < 0 or levels.max() > 65535):
            raise SkippedImage(
                "unsupported mode I", f"mode 'I' holds {levels.min()} to {levels.max()}, more than 16 bits"
            )
        levels = (levels.astype(np.uint16, copy=False) // 257).astype(np.uint8)
        return Image.fromarray(levels).convert("RGB")
    if image.mode == "F":  # the range of floating-point pixels is unknown
        raise SkippedImage("unsupported mode F", "mode 'F' has no defined range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise SkippedImage("missing", "an empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SkippedImage("too large", error) from None
    except Exception as error:  # plugins raise whatever a damaged header leads them to
        raise SkippedImage("undecodable", str(error).partition(" <_io.BytesIO")[0]) from None
    width, height = image.size
    if width < 1 or height < 1:
        raise SkippedImage("undecodable", f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise SkippedImage("too large", f"{width} x {height} pixels, more than {max_pixels:,}")
    return image


def _check_png(png: bytes) -> None:
    """Checks the checksums of the pixels. Pillow does not, and silently decodes damaged data to other pixels."""
    for name, chunk in _chunks(png):
        if name == b"IEND":
            return
        if name in PNG_NOTES:
            continue
        if len(chunk) < 12 + int.from_bytes(chunk[:4], "big"):
            raise SkippedImage("truncated", "the file ends within its pixels")
        if zlib.crc32(memoryview(chunk)[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            raise SkippedImage("undecodable", "a checksum does not fit")


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, the whole chunk: length, name, content and checksum) for each."""
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(png):
        length, name = struct.unpack_from(">I4s", png, start)
        end = start + 12 + length
        yield name, png[start:end]
        start = end


def _only_pixels(png: bytes) -> bytes:
    """The file without texts, color profiles and the like."""
    # upper case: a chunk that every reader has to understand
    kept = [chunk for name, chunk in _chunks(png) if name[:1].isupper() or name in PNG_CHUNKS]
    return b"".join([PNG_SIGNATURE, *kept])
