"""What decoding and cropping return, against Pillow, torchvision, numpy and closed forms."""

import ctypes
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError
from scipy.stats import ks_2samp
from skimage.data import astronaut
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from helpers.sample_images import encode, picture
from transformers_radio.data import DataConfig, decode_rgb, random_crop
from transformers_radio.data.images import SkippedImage, load_crops
from transformers_radio.modeling import RadioImageProcessor

# The EXIF definition: what the stored rows and columns mean, as numpy operations on (H, W, 3).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def crops_of(scale, ratio, **options) -> DataConfig:
    return DataConfig(crop_scale=scale, crop_ratio=ratio, **{"min_side": 1, **options})


def whole(data: bytes, resolutions: list[int], width: int, height: int) -> dict[int, torch.Tensor]:
    """load_crops with a crop that has no choice but the whole image."""
    return load_crops(data, resolutions, generator(), crops_of((1.0, 1.0), (width / height, width / height)))


def with_exif(image: Image.Image, orientation: int, file_format: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, file_format, exif=exif, **({"quality": 95} if file_format == "JPEG" else {}))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, file_format):
    data = with_exif(picture(1, 60, 24), orientation, file_format)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    expected = UPRIGHT[orientation](stored)
    assert np.array_equal(np.asarray(decode_rgb(data)), expected)
    height, width = expected.shape[:2]
    crop = whole(data, [24], width, height)[24]
    tensor = torch.from_numpy(expected.copy()).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    assert torch.equal(crop, F.resize(tensor, [24, 24], InterpolationMode.BICUBIC, antialias=True))


def test_exif_orientation_of_a_photograph_decoded_at_a_fraction():
    photo = Image.fromarray(astronaut()).resize((1600, 1200), Image.Resampling.BICUBIC)
    crop = whole(with_exif(photo, 6, "JPEG"), [100], 1200, 1600)[100]
    upright = np.rot90(np.asarray(photo), -1).copy()
    expected = np.asarray(Image.fromarray(upright).resize((100, 100), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(crop.permute(1, 2, 0).numpy() - expected).mean() < 2


def white_behind(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    alpha = alpha[..., None] / 255
    return color * alpha + 255 * (1 - alpha)


COLOR = np.asarray(picture(2)).astype(int)  # (32, 40, 3)
GREY = COLOR[..., 0]
ALPHA = np.tile(np.linspace(0, 255, 40).astype(int), (32, 1))


def image_of(*channels: np.ndarray, mode: str) -> Image.Image:
    return Image.merge(mode, [Image.fromarray(channel.astype(np.uint8)) for channel in channels])


def three(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def palette_image() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    indices = np.arange(32 * 40).reshape(32, 40) % 7
    palette = np.random.default_rng(0).integers(0, 256, (7, 3))
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image, palette[indices], indices


def cases() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """name -> (file, expected RGB, tolerance in levels)."""
    palette, palette_rgb, indices = palette_image()
    c, m, y, k = (COLOR[..., 0], COLOR[..., 1], COLOR[..., 2], GREY // 2)
    ink = np.stack([c, m, y], 2)
    key_transparent = white_behind(COLOR, np.where((COLOR == COLOR[0, 0]).all(2), 0, 255))
    color = image_of(*COLOR.transpose(2, 0, 1), mode="RGB")
    gray = Image.fromarray(GREY.astype(np.uint8))
    rgba = image_of(*COLOR.transpose(2, 0, 1), ALPHA, mode="RGBA")
    deep = (GREY * 257).astype(np.uint16)
    return {
        "L png": (encode(gray, "PNG"), three(GREY), 0),
        "L jpeg": (encode(gray, "JPEG", quality=100), three(GREY), 3),
        "1 png": (encode(Image.fromarray(GREY > 128), "PNG"), three((GREY > 128) * 255), 0),
        "LA png": (encode(image_of(GREY, ALPHA, mode="LA"), "PNG"), white_behind(three(GREY), ALPHA), 1),
        "RGBA png": (encode(rgba, "PNG"), white_behind(COLOR, ALPHA), 1),
        "RGBA webp": (encode(rgba, "WEBP", lossless=True, exact=True), white_behind(COLOR, ALPHA), 1),
        "RGB png with a transparent color": (
            encode(color, "PNG", transparency=tuple(COLOR[0, 0].tolist())),
            key_transparent,
            0,
        ),
        "P png": (encode(palette, "PNG"), palette_rgb, 0),
        "P gif": (encode(palette, "GIF"), palette_rgb, 0),
        "P png with transparency": (
            encode(palette, "PNG", transparency=bytes([0, 255, 128, 255, 255, 255, 255])),
            white_behind(palette_rgb, np.array([0, 255, 128, 255, 255, 255, 255])[indices]),
            1,
        ),
        "P gif with transparency": (
            encode(palette, "GIF", transparency=3),
            white_behind(palette_rgb, np.where(indices == 3, 0, 255)),
            0,
        ),
        "CMYK jpeg": (
            encode(image_of(c, m, y, k, mode="CMYK"), "JPEG", quality=100),
            (255 - ink) * (255 - k[..., None]) / 255,
            6,
        ),
        "CMYK tiff": (
            encode(image_of(c, m, y, k, mode="CMYK"), "TIFF"),
            (255 - ink) * (255 - k[..., None]) / 255,
            1,
        ),
        "I;16 png": (encode(Image.fromarray(deep), "PNG"), three(GREY), 0),
        "I;16 tiff": (encode(Image.fromarray(deep), "TIFF"), three(GREY), 0),
        "I;16B tiff": (
            encode(Image.frombytes("I;16B", (40, 32), deep.astype(">u2").tobytes()), "TIFF"),
            three(GREY),
            0,
        ),
        "webp": (encode(color, "WEBP", lossless=True), COLOR, 0),
        "bmp": (encode(color, "BMP"), COLOR, 0),
        "tiff": (encode(color, "TIFF"), COLOR, 0),
        "ppm": (encode(color, "PPM"), COLOR, 0),
        "progressive jpeg": (encode(color, "JPEG", quality=100, subsampling=0, progressive=True), COLOR, 4),
    }


@pytest.mark.parametrize("name", cases())
def test_every_mode_becomes_rgb(name):
    data, expected, tolerance = cases()[name]
    image = decode_rgb(data)
    assert image.mode == "RGB" and image.size == (40, 32)
    assert np.abs(np.asarray(image) - expected).max() <= tolerance
    crop = whole(data, [32], 40, 32)[32]
    assert torch.equal(crop, F.resize(F.pil_to_tensor(image), [32, 32], InterpolationMode.BICUBIC, antialias=True))


def reason(data: bytes, min_side: int = 1, **options) -> str:
    with pytest.raises(SkippedImage) as error:
        load_crops(data, [16], generator(), crops_of((1, 1), (1, 1), min_side=min_side, **options))
    return error.value.reason


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_half_a_file_is_skipped_even_when_pillow_is_told_to_be_lenient(file_format, monkeypatch):
    data = encode(picture(3, 200, 160), file_format)
    half = data[: len(data) // 2]
    assert reason(half) in ("truncated", "undecodable")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert reason(half) in ("truncated", "undecodable")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # other users of Pillow keep their setting


def test_reasons(monkeypatch):
    jpeg = encode(picture(4, 200, 160))
    assert reason(jpeg[:-200]) == "truncated"
    assert reason(b"") == "missing"
    assert reason(b"<html>") == "undecodable"
    assert reason(jpeg[:20]) == "undecodable"
    assert reason(encode(picture(4, 40, 15)), min_side=16) == "too small"
    assert reason(encode(Image.new("F", (20, 20)), "TIFF")) == "unsupported mode F"
    assert reason(encode(Image.fromarray(np.full((20, 20), 70000, np.int32)), "TIFF")) == "unsupported mode I"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason(jpeg) == "too large"


def test_formats_that_run_programs_are_not_opened(monkeypatch):
    def no_program(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", no_program)
    monkeypatch.setattr(subprocess, "Popen", no_program)
    assert reason(encode(picture(5), "EPS")) == "undecodable"


def test_a_damaged_exif_block_does_not_cost_the_image():
    data = bytearray(with_exif(picture(6), 6, "JPEG"))
    start = data.index(b"Exif\x00\x00") + 6
    data[start : start + 8] = b"\xff" * 8
    assert decode_rgb(bytes(data)).size == (40, 32)


@pytest.mark.parametrize("resolutions", [[64], [48, 100, 300]])
def test_crop_is_resized_from_the_original_pixels_to_every_resolution(resolutions):
    photo = Image.fromarray(astronaut())  # 512 x 512
    data = encode(photo, "PNG")
    for seed in range(5):
        crops = load_crops(data, resolutions, generator(seed), crops_of((0.3, 1.0), (3 / 4, 4 / 3)))
        left, top, right, bottom = random_crop((512, 512), generator(seed), (0.3, 1.0), (3 / 4, 4 / 3))
        assert list(crops) == resolutions
        for r, crop in crops.items():
            assert crop.shape == (3, r, r) and crop.dtype == torch.uint8
            pillow = np.asarray(photo.crop((left, top, right, bottom)).resize((r, r), Image.Resampling.BICUBIC))
            difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - pillow.astype(int))
            # Both round between the two passes, in another order; that tells only where an overshoot is cut off.
            assert difference.mean() < 0.5 and (difference > 1).mean() < 0.002
            tensor = F.resized_crop(
                F.pil_to_tensor(photo).float(), top, left, bottom - top, right - left, [r, r],
                InterpolationMode.BICUBIC, antialias=True,
            )  # fmt: skip
            assert (crop - tensor.clamp(0, 255)).abs().mean() < 0.5  # rounding


def test_jpeg_is_decoded_at_a_fraction_but_never_below_the_largest_resolution(monkeypatch):
    photo = Image.fromarray(astronaut()).resize((2000, 1500), Image.Resampling.BICUBIC)
    data = encode(photo, "JPEG", quality=95)
    decoded = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    factors, seen = [], []
    draft = JpegImagePlugin.JpegImageFile.draft

    def spy(self, mode, size):
        result = draft(self, mode, size)
        factors.append(2000 / self.size[0])
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    for seed in range(12):
        largest = (60, 150, 224, 500)[seed % 4]
        factors.clear()
        crops = load_crops(data, [32, largest], generator(seed), crops_of((0.1, 1.0), (3 / 4, 4 / 3)))
        left, top, right, bottom = random_crop((2000, 1500), generator(seed), (0.1, 1.0), (3 / 4, 4 / 3))
        room = min(right - left, bottom - top) / largest
        factor = factors[0] if factors else 1
        assert factor <= max(room, 1) and (factor == 8 or 2 * factor > room)
        # The box is rounded outwards to whole pixels of the smaller image.
        f = round(factor)
        assert abs(factor - f) < 0.02 and f in (1, 2, 4, 8)
        used = decoded[top // f * f : -(-bottom // f) * f, left // f * f : -(-right // f) * f]
        for r, crop in crops.items():
            full = Image.fromarray(used).resize((r, r), Image.Resampling.BICUBIC)
            difference = np.abs(crop.permute(1, 2, 0).numpy().astype(int) - np.asarray(full).astype(int))
            seen.append((f, r, round(float(difference.mean()), 2)))
    assert max(mean for _, _, mean in seen) < 2
    assert {f for f, _, _ in seen} == {1, 2, 4, 8}


def test_random_crop_draws_what_torchvision_draws():
    size, scale, ratio = (500, 375), (0.2, 0.9), (3 / 4, 4 / 3)
    numbers = generator(0)
    ours = np.array([random_crop(size, numbers, scale, ratio) for _ in range(3000)])
    torch.manual_seed(0)
    blank = torch.empty(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(3000)])
    top, left, height, width = theirs.T
    for mine, other in zip(ours.T, (left, top, left + width, top + height), strict=True):
        assert ks_2samp(mine, other).pvalue > 0.001
    width, height = ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    assert ours.min() >= 0 and ours[:, 2].max() <= 500 and ours[:, 3].max() <= 375
    area = width * height / (500 * 375)
    assert area.min() > 0.19 and area.max() < 0.91
    assert (width / height).min() > 0.74 and (width / height).max() < 1.35


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000)])
def test_random_crop_of_very_long_images_is_torchvisions_fallback(size):
    box = random_crop(size, generator(), (0.5, 1.0), (3 / 4, 4 / 3))
    top, left, height, width = RandomResizedCrop.get_params(
        torch.empty(3, size[1], size[0]), [0.5, 1.0], [3 / 4, 4 / 3]
    )
    assert box == (left, top, left + width, top + height)


def test_horizontal_flip_mirrors_half_of_the_crops_and_nothing_else():
    data = encode(picture(7, 64, 64), "PNG")
    flipped = 0
    for seed in range(40):
        plain = load_crops(data, [32], generator(seed), crops_of((0.5, 1.0), (3 / 4, 4 / 3)))[32]
        flips = crops_of((0.5, 1.0), (3 / 4, 4 / 3), horizontal_flip=True)
        maybe = load_crops(data, [32], generator(seed), flips)[32]
        if not torch.equal(maybe, plain):
            assert (maybe.int() - plain.flip(2).int()).abs().max() <= 1  # resizing a mirrored image rounds anew
            flipped += 1
    assert 10 < flipped < 30


def png_with(*chunks: tuple[bytes, bytes], behind: bool = False, damaged: bool = False) -> bytes:
    """A PNG with these (name, content) before its pixels, or behind them."""
    whole_file = encode(picture(3), "PNG")
    added = b""
    for name, content in chunks:
        checksum = zlib.crc32(name + content) ^ damaged
        added += struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    place = whole_file.index(b"IEND" if behind else b"IDAT") - 4
    return whole_file[:place] + added + whole_file[place:]


LONG = zlib.compress(b"x" * 3_000_000)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"Comment\0\0" + LONG)],
        [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG)],
        [(b"iCCP", b"profile\0\0" + LONG)],
        [(b"tEXt", b"prompt\0" + b"x" * 4000), (b"tEXt", b"workflow\0" + b"x" * 4000)],
        [(b"iCCP", b"profile\0\7" + zlib.compress(b"x"))],
    ],
    ids=["comment", "xmp", "profile", "many texts", "profile of unknown compression"],
)
def test_long_texts_and_profiles_do_not_cost_the_image(chunks, behind, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 5000)  # 64 MB
    data = png_with(*chunks, behind=behind)
    with pytest.raises((ValueError, SyntaxError, UnidentifiedImageError)):  # or this would say nothing
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(np.asarray(decode_rgb(data)), np.asarray(picture(3)))
    assert torch.equal(whole(data, [32], 40, 32)[32], whole(encode(picture(3), "PNG"), [32], 40, 32)[32])


def test_a_damaged_text_costs_neither_the_image_nor_its_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png_with((b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    place = data.index(b"IDAT") - 4
    text = png_with((b"tEXt", b"a\0b"), damaged=True)
    start = text.index(b"tEXt") - 4
    data = data[:place] + text[start : start + 15] + data[place:]
    assert np.array_equal(np.asarray(decode_rgb(data)), np.rot90(np.asarray(picture(3)), -1))


def test_damaged_pixels_of_a_png_are_still_noticed():
    data = bytearray(encode(picture(3), "PNG"))
    data[data.index(b"IDAT") + 60] ^= 255
    assert reason(bytes(data)) in ("undecodable", "truncated")
    data = png_with((b"zTXt", b"Comment\0\0" + LONG))
    assert reason(data[:-200]) == "truncated"
    assert reason(data[: data.index(b"IDAT") + 40]) == "truncated"
    assert reason(data[:60]) in ("truncated", "undecodable")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_of_too_many_pixels_are_not_decoded(file_format, monkeypatch):
    data = encode(picture(4, 50, 40), file_format)
    assert load_crops(data, [16], generator(), crops_of((1, 1), (1, 1), max_pixels=2000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("was decoded"))
    assert reason(data, max_pixels=1999) == "too large"


def test_conversions_that_fail_are_skipped(monkeypatch):
    """A palette may be damaged in ways that only its conversion notices, with any exception."""

    def convert(self, mode):
        raise KeyError(mode)

    data = encode(picture(4).convert("L"), "PNG")
    monkeypatch.setattr(Image.Image, "convert", convert)
    assert reason(data) == "unsupported mode L"


def peak(work) -> int:
    """Bytes that a process takes on top of what it has. In one of its own, as a peak stays."""

    def kilobytes(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    read_end, write_end = os.pipe()
    if os.fork() == 0:
        try:
            ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: blocks of a megabyte go back when they are freed
            before = kilobytes("VmRSS")
            work()
            os.write(write_end, str(kilobytes("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end) as pipe:
        found = pipe.read()
    os.wait()
    return 1024 * int(found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["deep.png", "rgba.png"])
def test_memory_of_one_image(name, tmp_path):
    """The bytes for each pixel that docs/data.md states; a margin more, as freed memory does not go back at once."""

    def write(side: int) -> bytes:
        levels = np.tile((np.arange(side) % 251).astype(np.uint8), (side, 1))
        deep = Image.fromarray(levels.astype(np.uint16) * 200)
        image = deep if name == "deep.png" else Image.merge("RGBA", [Image.fromarray(levels)] * 4)
        image.save(tmp_path / name)
        return (tmp_path / name).read_bytes()

    def crop(data: bytes) -> None:
        load_crops(data, [32], generator(), crops_of((1, 1), (1, 1)))

    processor = RadioImageProcessor(size=32)
    crop(write(64))
    processor(tmp_path / name)  # what the first image needs besides belongs to no image
    data, pixels = write(3000), 3000**2
    assert peak(lambda: decode_rgb(data)) / pixels < 1.2 * 12
    assert peak(lambda: crop(data)) / pixels < 1.2 * 12
    assert peak(lambda: processor(tmp_path / name)) / pixels < 1.3 * 14
