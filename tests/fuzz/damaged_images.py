"""Bytes of image files, through training's decoder and, as paths, through the image processor."""

import functools
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from damage import choose, damage
from isolation import COUNTED, SOUND, UNDETECTABLE, Case, OtherBits
from PIL import Image, ImageCms, PngImagePlugin

from transformers_radio import RadioImageProcessor
from transformers_radio.data import DataConfig
from transformers_radio.data.images import SkippedImage, decode_rgb, load_crops


def prepare(folder: Path) -> dict[str, bytes]:
    """name.extension -> a sound file."""
    rng = np.random.default_rng(0)
    noise, many = (rng.integers(0, 256, (*sides, 3), dtype=np.uint8) for sides in ((12, 16), (200, 300)))
    rgb = Image.fromarray(noise).resize((72, 56), Image.Resampling.BICUBIC)
    rgba, grey16 = rgb.copy(), Image.fromarray(np.asarray(rgb)[..., 0].astype(np.uint16) * 257)
    rgba.putalpha(rgb.getchannel(0))
    exif = Image.Exif()
    exif[0x0112] = 6
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("caption", "a picture " * 30, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made = [
        ("rgb.png", rgb, {}),
        ("rgba.png", rgba, {"exif": exif}),
        ("long.png", Image.fromarray(many), {"compress_level": 1}),
        ("grey16.png", grey16, {}),
        ("palette.png", rgb.quantize(64), {"transparency": 3}),
        ("texts.png", rgb, {"pnginfo": texts, "icc_profile": profile}),
        ("animated.png", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("baseline.jpg", rgb, {"exif": exif, "icc_profile": profile}),
        ("progressive.jpg", rgb, {"progressive": True}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("large.jpg", rgb.resize((512, 384)), {"quality": 30}),
        ("two.mpo", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("lossy.webp", rgba, {"exif": exif}),
        ("lossless.webp", rgb, {"lossless": True}),
        ("animated.webp", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("still.gif", rgb.quantize(64), {}),
        ("animated.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("raw.tiff", rgb, {}),
        ("lzw.tiff", rgba, {"compression": "tiff_lzw"}),
        ("deflate.tiff", grey16, {"compression": "tiff_deflate"}),
        ("jpeg.tiff", rgb, {"compression": "jpeg"}),
        ("group4.tiff", rgb.convert("1"), {"compression": "group4"}),
        ("rgb.bmp", rgb, {}),
        ("palette.bmp", rgb.quantize(16), {}),
        ("rgb.ppm", rgb, {}),
        ("bits.pbm", rgb.convert("1"), {}),
        ("grey16.pgm", grey16, {}),
        ("lossless.jp2", rgb, {}),
        ("rgba.jp2", rgba, {"irreversible": True}),
        ("still.avif", rgba, {"exif": exif}),
        ("icon.ico", rgba, {}),
    ]
    Image.init()
    files = {}
    for name, image, options in made:
        if "." + name.split(".")[1] in Image.registered_extensions():
            buffer = io.BytesIO()
            image.save(buffer, Image.registered_extensions()["." + name.split(".")[1]], **options)
            files[name] = buffer.getvalue()
    return files


def draw(rng: np.random.Generator, files: dict[str, bytes], folder: Path) -> Case:
    name = choose(rng, choose(rng, (files, [name for name in files if name.endswith("png")])))  # with checksums
    what, data = damage(rng, files[name])
    if name.endswith("png") and rng.random() < 0.3:
        what, data = f"{what}, checksums made anew", with_checksums(data)
    way = choose(rng, ("decode_rgb", "load_crops", "RadioImageProcessor"))
    path = folder / name
    path.write_bytes(data)
    run = {"decode_rgb": check_decoded, "load_crops": check_crops, "RadioImageProcessor": check_processed}[way]
    has_checksum = name.endswith("png") and "anew" not in what
    return Case(f"{way}, {name}: {what}", (name,), functools.partial(run, path, files[name], has_checksum))


def with_checksums(png: bytes) -> bytes:
    """The chunks with checksums that fit, as a program writes them that means what it writes."""
    parts, place = [png[:8]], 8
    while place + 8 <= len(png):
        length = struct.unpack_from(">I", png, place)[0]
        body = png[place + 4 : place + 8 + length]
        parts += [png[place : place + 4], body, struct.pack(">I", zlib.crc32(body))]
        place += 12 + length
    return b"".join(parts)


def _compare(now, sound, has_checksum: bool) -> str:
    if type(now) is type(sound) and now.shape == sound.shape and (now == sound).all():
        return SOUND
    if has_checksum:
        raise OtherBits("other pixels, though a checksum does not fit")
    return UNDETECTABLE


def check_decoded(path: Path, sound: bytes, has_checksum: bool) -> str:
    try:
        image = decode_rgb(path.read_bytes())
    except SkippedImage:
        return COUNTED
    if image.mode != "RGB" or min(image.size) < 1:
        raise OtherBits(f"mode {image.mode}, size {image.size}")
    if path.suffix == ".ico":
        return UNDETECTABLE
    return _compare(np.asarray(image), np.asarray(decode_rgb(sound)), has_checksum)


def check_crops(path: Path, sound: bytes, has_checksum: bool) -> str:
    def crops(data: bytes) -> torch.Tensor:
        config = DataConfig(crop_scale=(0.5, 1), crop_ratio=(0.75, 1.33))
        found = load_crops(data, [16, 24], np.random.default_rng(1), config)
        if {r: (crop.shape, crop.dtype) for r, crop in found.items()} != {
            r: ((3, r, r), torch.uint8) for r in (16, 24)
        }:
            raise OtherBits(f"crops {[crop.shape for crop in found.values()]}")
        return torch.cat([crop.flatten() for crop in found.values()])

    try:
        now = crops(path.read_bytes())
    except SkippedImage:
        return COUNTED
    return UNDETECTABLE if path.suffix == ".ico" else _compare(now, crops(sound), has_checksum)


def check_processed(path: Path, sound: bytes, has_checksum: bool) -> str:
    """The processor says that it reads files as training does."""
    processor = RadioImageProcessor(do_resize=False)
    now = processor(str(path), return_tensors="pt")["pixel_values"][0]  # (3, h, w)
    try:
        trained = torch.from_numpy(np.asarray(decode_rgb(path.read_bytes())).copy()).permute(2, 0, 1) / 255
    except SkippedImage as error:
        raise OtherBits(f"the processor reads what training skips ({error})") from None
    if not torch.equal(now, trained):
        if path.name == "group4.tiff":  # Pillow 12 leaves what it cannot decode of it as it finds the memory
            return UNDETECTABLE
        raise OtherBits("the processor reads other pixels than training")
    if path.suffix == ".ico":
        return UNDETECTABLE
    path.write_bytes(sound)
    return _compare(now, processor(str(path), return_tensors="pt")["pixel_values"][0], has_checksum)
