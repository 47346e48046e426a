"""RadioImageProcessor against torchvision, Pillow, and what training reads."""

import base64
import json
import socketserver
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvF

from transformers_radio.data.images import decode_rgb
from transformers_radio.modeling.image_processing_radio import RadioImageProcessor


def photo(height: int, width: int) -> Image.Image:
    """Smooth color gradients with some noise, so that neighboring pixels differ but no filter rings everywhere."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / width, 255 * y / height, 127 + 100 * np.sin(x / 7) * np.cos(y / 5)], axis=-1)
    return Image.fromarray((image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8))


def torchvision_resize(image: Image.Image, height: int, width: int) -> torch.Tensor:
    tensor = tvF.pil_to_tensor(image)
    tensor = tvF.resize(tensor, [height, width], interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
    return tvF.to_dtype(tensor, torch.float32, scale=True)


def test_exact_size_equals_torchvision_and_pillow():
    image = photo(75, 130)
    pixel_values = RadioImageProcessor(size={"height": 64, "width": 96})(image, return_tensors="pt").pixel_values
    assert pixel_values.dtype == torch.float32 and pixel_values.shape == (1, 3, 64, 96)
    torch.testing.assert_close(pixel_values[0], torchvision_resize(image, 64, 96), rtol=0, atol=1e-6)
    pillow = np.asarray(image.resize((96, 64), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    np.testing.assert_allclose(pixel_values[0].permute(1, 2, 0).numpy(), pillow, atol=1.01 / 255)


@pytest.mark.parametrize(
    "size, image_size, expected",
    [
        ({"height": 66, "width": 90}, (50, 50), (64, 96)),  # 90 / 16 = 5.6
        ({"height": 3, "width": 5}, (50, 50), (16, 16)),  # at least one step
        (48, (20, 90), (48, 48)),  # an int is a square
        ({"shortest_edge": 64}, (100, 150), (64, 96)),
        ({"shortest_edge": 64}, (150, 111), (80, 64)),  # 150 * 64 / 111 = 86.5, nearest multiple 80
        ({"shortest_edge": 60}, (40, 40), (64, 64)),
    ],
)
def test_sides_are_the_nearest_supported_ones(size, image_size, expected):
    image = photo(*image_size)
    pixel_values = RadioImageProcessor(size=size)(image, return_tensors="pt").pixel_values
    assert pixel_values.shape[-2:] == expected
    torch.testing.assert_close(pixel_values[0], torchvision_resize(image, *expected), rtol=0, atol=1e-6)


def test_size_divisor_sets_the_step():
    processor = RadioImageProcessor(size={"shortest_edge": 64}, size_divisor=32)
    assert processor(photo(100, 170), return_tensors="pt").pixel_values.shape[-2:] == (64, 96)  # 108.8 -> 96


def test_longest_side_keeps_the_aspect_ratio_and_marks_the_padding():
    images = [photo(100, 200), photo(90, 60)]
    output = RadioImageProcessor(size={"longest_edge": 96})(images, return_tensors="pt")
    # 100 x 200 -> 48 x 96, 90 x 60 -> 96 x 64; the batch is padded to its largest height and width
    assert output.pixel_values.shape == (2, 3, 96, 96) and output.pixel_mask.shape == (2, 96, 96)
    for index, (image, (height, width)) in enumerate(zip(images, [(48, 96), (96, 64)], strict=True)):
        expected = torch.zeros(3, 96, 96)
        expected[:, :height, :width] = torchvision_resize(image, height, width)
        torch.testing.assert_close(output.pixel_values[index], expected, rtol=0, atol=1e-6)
        assert output.pixel_mask[index].sum() == height * width
        assert output.pixel_mask[index, :height, :width].all()


def test_one_image_is_padded_to_the_next_multiple_only():
    # LLaVA-1.5 in the paper: long edge 432, short edge padded only up to a patch multiple; 640 x 480 -> 432 x 324
    output = RadioImageProcessor(size={"longest_edge": 432})(photo(480, 640), return_tensors="pt")
    assert output.pixel_values.shape == (1, 3, 336, 432)
    assert output.pixel_mask.sum() == 324 * 432


def test_every_kind_of_image_gives_the_same_pixels():
    image = photo(40, 56)
    array, tensor = np.array(image), tvF.pil_to_tensor(image)
    processor = RadioImageProcessor(size={"height": 32, "width": 48})
    expected = processor(image, return_tensors="pt").pixel_values
    for same in (array, array.transpose(2, 0, 1), array.astype(np.int64), tensor, [image], [tensor], tensor[None]):
        torch.testing.assert_close(processor(same, return_tensors="pt").pixel_values, expected, rtol=0, atol=0)
    # float images in [0, 1] keep their values; only the rounding to 8 bits in each pass of the resize differs
    for same in (tensor / 255, array.astype(np.float32) / 255, (tensor / 255).double()):
        pixel_values = processor(same, return_tensors="pt").pixel_values
        assert pixel_values.dtype == torch.float32 and pixel_values.min() >= 0 and pixel_values.max() <= 1
        torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1.5 / 255)


def test_gray_and_transparent_images_become_rgb():
    processor = RadioImageProcessor(size={"height": 32, "width": 32})
    gray = photo(32, 32).convert("L")
    pixel_values = processor(gray, return_tensors="pt").pixel_values
    expected = torch.from_numpy(np.array(gray)).float().div(255).expand(1, 3, 32, 32)
    torch.testing.assert_close(pixel_values, expected)
    torch.testing.assert_close(processor(np.array(gray), return_tensors="pt").pixel_values, expected)

    alpha = np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))
    rgba = np.dstack([np.array(photo(32, 32)), alpha])
    rgb, opacity = torch.from_numpy(rgba[..., :3] / 255), torch.from_numpy(rgba[..., 3:] / 255)
    expected = (rgb * opacity + 1 - opacity).permute(2, 0, 1)[None].float()  # over white
    for image in (Image.fromarray(rgba, "RGBA"), rgba):
        pixel_values = processor(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1.01 / 255)


def test_boolean_and_unsigned_images_are_read_by_their_type():
    processor = RadioImageProcessor(size={"height": 32, "width": 32})
    gray = np.array(photo(32, 32).convert("L"))
    black_and_white = torch.from_numpy(gray > 127).float().expand(1, 3, 32, 32)
    for image in (
        gray > 127,
        torch.from_numpy(gray > 127),
        np.stack([gray > 127] * 3, -1),
        Image.fromarray(gray > 127),
    ):
        assert torch.equal(processor(image, return_tensors="pt").pixel_values, black_and_white)
    expected = processor(gray, return_tensors="pt").pixel_values
    for wide in (np.uint16, np.uint32, np.uint64):
        array = gray.astype(wide)
        for image in (array, torch.from_numpy(array)):
            assert torch.equal(processor(image, return_tensors="pt").pixel_values, expected)
    with pytest.raises(ValueError, match="must be in 0..255, got values from 300 to 300; convert to 8 bits"):
        processor(np.full((32, 32, 3), 300, np.uint16))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pil_images_are_turned_upright(mode, tmp_path):
    upright = photo(32, 48).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "phone.png", exif=exif)
    processor = RadioImageProcessor(size={"shortest_edge": 32})
    expected = processor(upright, return_tensors="pt").pixel_values
    found = processor(Image.open(tmp_path / "phone.png"), return_tensors="pt").pixel_values
    assert found.shape == (1, 3, 32, 48) and torch.equal(found, expected)


def test_black_and_white_span_the_whole_range_even_where_bicubic_overshoots():
    edge = torch.zeros(3, 40, 40)
    edge[:, :, 20:] = 1.0
    for image in (edge, (edge * 255).to(torch.uint8)):
        pixel_values = RadioImageProcessor(size={"height": 64, "width": 64})(image, return_tensors="pt").pixel_values
        assert pixel_values.min() == 0 and pixel_values.max() == 1


@pytest.mark.parametrize(
    "options, image, message",
    [
        ({"size": {"max_height": 64, "max_width": 64}}, None, "max_height"),
        ({"size": {"shortest_edge": 0}}, None, "positive"),
        ({"size_divisor": 0}, None, "size_divisor=0"),
        ({"do_normalize": True, "image_mean": 0.5, "image_std": 0.5}, None, "the model normalizes"),
        ({"do_center_crop": True, "crop_size": 32}, None, "do_center_crop"),
        ({"rescale_factor": 1 / 127.5}, None, "rescale_factor"),
        ({}, torch.full((3, 32, 32), 200.0), "200.0"),
        ({}, torch.full((3, 32, 32), float("nan")), r"\[0, 1\]"),
        ({}, np.full((32, 32, 3), 4096, dtype=np.int32), "4096"),
        ({}, Image.new("F", (32, 32)), "mode 'F' has no defined range"),
        ({}, Image.fromarray(np.full((32, 32), 70000, np.int32)), "70000 to 70000, more than 16 bits"),
        ({}, "no_such_photo.png", "'no_such_photo.png' is not an image: there is no such file"),
        ({}, ["/tmp"], "/tmp cannot be read as an image"),
        ({}, Path("/dev/zero"), "/dev/zero cannot be read as an image .a folder, pipe or device"),
        ({}, b"bytes", "an image of type bytes is not supported"),
        ({}, np.zeros((0, 32, 3), dtype=np.uint8), r"shape \(0, 32, 3\) has no pixels"),
        ({}, "http://127.0.0.1:9/photo.png", "http://127.0.0.1:9/photo.png cannot be read as an image .*refused"),
        ({"size": {"shortest_edge": 432}}, np.zeros((2, 50000, 3), np.uint8), "432 x 10800000 pixels of an image"),
        ({"size": {"longest_edge": 10**9}}, np.zeros((32, 32, 3), np.uint8), "more than 120,000,000"),
        ({"do_rescale": False}, np.zeros((32, 32, 3), dtype=np.uint8), "do_rescale"),
        ({}, np.zeros((32, 32, 2), dtype=np.uint8), "channel"),
        (
            {"size": {"shortest_edge": 32}},
            [np.zeros((32, 32, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)],
            "shapes",
        ),
    ],
)
def test_wrong_input_is_named(options, image, message):
    with pytest.raises(ValueError, match=message):
        RadioImageProcessor(**options)(photo(32, 32) if image is None else image, return_tensors="pt")


def test_semantic_maps_have_the_target_sizes():
    torch.manual_seed(0)
    outputs = SimpleNamespace(logits=torch.randn(2, 5, 4, 6))
    processor = RadioImageProcessor()
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=[(30, 45), (17, 8)])
    for scores, segmentation, size in zip(outputs.logits, maps, [(30, 45), (17, 8)], strict=True):
        expected = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False).argmax(1)[0]
        assert segmentation.dtype == torch.int64 and torch.equal(segmentation, expected)
    plain = processor.post_process_semantic_segmentation(outputs)
    assert torch.equal(torch.stack(plain), outputs.logits.argmax(1))
    with pytest.raises(ValueError, match="1 target_sizes for 2 images"):
        processor.post_process_semantic_segmentation(outputs, target_sizes=[(30, 45)])


def test_semantic_maps_leave_out_the_padding():
    # left half class 0, right half class 1, and whatever lies in the padding is class 2
    image = np.zeros((60, 120, 3), dtype=np.uint8)
    inputs = RadioImageProcessor(size={"longest_edge": 128}, size_divisor=16)(
        [image, image.transpose(1, 0, 2)], return_tensors="pt"
    )
    assert inputs.pixel_values.shape == (2, 3, 128, 128)
    logits = torch.zeros(2, 3, 8, 8)
    logits[:, 2] = 5.0
    logits[0, :, :4, :4] = torch.tensor([10.0, 0, 0])[:, None, None]
    logits[0, :, :4, 4:] = torch.tensor([0, 10.0, 0])[:, None, None]
    segmentation = RadioImageProcessor().post_process_semantic_segmentation(
        SimpleNamespace(logits=logits), target_sizes=[(60, 120), (120, 60)], pixel_mask=inputs.pixel_mask
    )
    assert segmentation[0].shape == (60, 120) and segmentation[1].shape == (120, 60)
    assert (segmentation[0][:50, :55] == 0).all() and (segmentation[0][:50, 65:] == 1).all()


def files(folder) -> dict:
    """Image files of many kinds by name; all that can be saved without loss."""
    rgb = photo(40, 56)
    alpha = np.tile(np.linspace(0, 255, 56).astype(np.uint8), (40, 1))
    rgba = Image.fromarray(np.dstack([np.array(rgb), alpha]), "RGBA")
    sixteen = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (40, 56)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = rgb.quantize(16)
    palette.info["transparency"] = 3
    pictures = {
        "rgb.png": (rgb, {}),
        "rgba.png": (rgba, {}),
        "la.png": (rgba.convert("LA"), {}),
        "palette.png": (palette, {"transparency": 3}),
        "bits.png": (rgb.convert("1"), {}),
        "sixteen.png": (sixteen, {}),
        "sixteen.tiff": (sixteen, {}),
        "rgba.tiff": (rgba, {}),
        "cmyk.tiff": (rgb.convert("CMYK"), {}),
        "gray.bmp": (rgb.convert("L"), {}),
        "rgb.ppm": (rgb, {}),
        "rgba.webp": (rgba, {"lossless": True}),
        "phone.jpg": (rgb, {"exif": exif}),
        "photo.jpg": (rgb, {}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(folder / name, **options)
    return {name: folder / name for name in pictures}


def test_files_are_read_as_in_training(tmp_path):
    for name, path in files(tmp_path).items():
        expected = tvF.pil_to_tensor(decode_rgb(path.read_bytes())).float() / 255
        processor = RadioImageProcessor(do_resize=False)
        for image in (str(path), path, Image.open(path)):
            pixel_values = processor(image, return_tensors="pt").pixel_values
            assert torch.equal(pixel_values[0], expected), name
    half = torch.from_numpy(np.array(Image.open(tmp_path / "rgba.png"))).permute(2, 0, 1) / 255
    pixel_values = processor(str(tmp_path / "rgba.png"), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(pixel_values, half[:3] * half[3:] + 1 - half[3:], rtol=0, atol=1.01 / 255)
    sixteen = np.array(Image.open(tmp_path / "sixteen.png")) / 65535
    pixel_values = processor(tmp_path / "sixteen.png", return_tensors="pt").pixel_values[0, 0]
    torch.testing.assert_close(pixel_values, torch.from_numpy(sixteen).float(), rtol=0, atol=1.01 / 255)


def test_damaged_files_are_named(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    for name in ("photo.png", "photo.jpg", "photo.webp", "photo.tiff"):
        image.save(tmp_path / name)
        data = bytearray((tmp_path / name).read_bytes())
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            RadioImageProcessor()(str(tmp_path / name))
    image.save(tmp_path / "flipped.png")
    data = bytearray((tmp_path / "flipped.png").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "flipped.png").write_bytes(data)
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name in ("flipped.png", "text.png", "empty.png"):
        for call in (RadioImageProcessor(), RadioImageProcessor().fetch_images):
            with pytest.raises(ValueError, match=f"{name} cannot be read as an image") as caught:
                call([tmp_path / name])
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"flipped.png cannot be read as an image"):
        RadioImageProcessor()(Image.open(tmp_path / "flipped.png"))  # Pillow decodes when pixels are asked for


def test_image_sizes_are_those_without_the_padding_of_the_batch():
    images = [photo(100, 200), photo(90, 60)]  # 48 x 96 and 96 x 64
    processor = RadioImageProcessor(size={"longest_edge": 96}, size_divisor=32)
    output = processor(images, return_image_sizes=True, return_pixel_mask=False, return_tensors="pt")
    assert sorted(output) == ["image_sizes", "pixel_values"]
    assert output.image_sizes.tolist() == [[64, 96], [96, 64]]
    exact = RadioImageProcessor(size={"height": 32, "width": 48}, return_image_sizes=True)
    assert exact(images, return_tensors="pt").image_sizes.tolist() == [[32, 48], [32, 48]]


def test_the_saved_processor_is_the_same(tmp_path):
    processor = RadioImageProcessor(size={"shortest_edge": 48}, size_divisor=16)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["auto_map"]["AutoImageProcessor"] == "image_processing_radio.RadioImageProcessor"
    reloaded = RadioImageProcessor.from_pretrained(tmp_path)
    assert reloaded.size == {"shortest_edge": 48} and reloaded.size_divisor == 16
    image = photo(60, 100)
    expected = processor(image, return_tensors="pt").pixel_values
    assert torch.equal(reloaded(image, return_tensors="pt").pixel_values, expected)


@pytest.mark.parametrize(
    "field, values",
    [
        ("do_resize", [None, "no", [1], float("nan")]),
        ("do_rescale", [None, "yes"]),
        ("do_convert_rgb", [None, {"a": 1}]),
        ("return_pixel_mask", [None, "yes"]),
        ("return_image_sizes", [None, 2]),
        ("resample", [None, "cubic", [3], -1, 2.5]),
        ("size", [None, [64], "64", {}, {"height": "a", "width": 64}, {"shortest_edge": "48"}, {"longest_edge": 4.5}]),
        ("size", [True, {"height": None, "width": 64}, [64, "a"]]),
        ("size_divisor", [None, "16", [16], 1.5, True, 0]),
        ("crop_size", [[1]]),
    ],
)
def test_saved_settings_of_wrong_types_are_named(field, values, tmp_path):
    RadioImageProcessor().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    good = json.loads(file.read_text())
    for value in values:
        file.write_text(json.dumps({**good, field: value}))
        with pytest.raises(ValueError, match=field) as caught:
            RadioImageProcessor.from_pretrained(tmp_path)(photo(32, 32))
        assert "\n" not in str(caught.value)


def orientation_in_xmp() -> PngImagePlugin.PngInfo:
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>')
    return texts


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "PNG with XMP"])
def test_images_are_turned_once(file_format, tmp_path):
    """From the path, from Pillow, and after training's decoder has turned them."""
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    options = {"pnginfo": orientation_in_xmp()} if "XMP" in file_format else {"exif": exif}
    path, kind = tmp_path / "phone", file_format.partition(" ")[0]
    photo(32, 48).save(path, kind, **options)
    photo(32, 48).save(tmp_path / "plain", kind)
    upright = np.rot90(np.asarray(Image.open(tmp_path / "plain").convert("RGB")), -1).copy()
    expected = torch.from_numpy(upright).permute(2, 0, 1)[None] / 255
    opened = Image.open(path)
    for image in (str(path), opened, opened, decode_rgb(path.read_bytes())):
        found = RadioImageProcessor(do_resize=False)(image, return_tensors="pt").pixel_values
        assert torch.equal(found, expected)


@pytest.mark.parametrize("file_format", ["WEBP", "AVIF", "JPEG2000", "GIF", "PNG"])
def test_half_transparent_files_lie_over_white(file_format, tmp_path):
    rgba = np.dstack([np.array(photo(32, 48)), np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1))])
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.image", file_format, **{"lossless": True, "exact": True})
    stored = np.asarray(Image.open(tmp_path / "a.image").convert("RGBA")).astype(np.float32) / 255
    over_white = stored[..., :3] * stored[..., 3:] + 1 - stored[..., 3:]
    text = base64.b64encode((tmp_path / "a.image").read_bytes()).decode()
    for image in (tmp_path / "a.image", Image.open(tmp_path / "a.image"), text, f"data:image/x;base64,{text}"):
        found = RadioImageProcessor(do_resize=False)(image, return_tensors="pt").pixel_values[0].permute(1, 2, 0)
        np.testing.assert_allclose(found, over_white, atol=1.01 / 255)


def test_a_url_is_read_like_a_file(tmp_path):
    Image.fromarray(np.dstack([np.array(photo(32, 48)), np.full((32, 48), 99, np.uint8)]), "RGBA").save(
        tmp_path / "a.png"
    )
    with socketserver.TCPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        processor = RadioImageProcessor(do_resize=False)
        found = processor(f"{url}/a.png", return_tensors="pt").pixel_values
        assert torch.equal(found, processor(tmp_path / "a.png", return_tensors="pt").pixel_values)
        with pytest.raises(ValueError, match="/gone.png cannot be read as an image .*404") as caught:
            processor(f"{url}/gone.png")
        assert "\n" not in str(caught.value)
        server.shutdown()


def test_png_files_with_damaged_texts_are_read(tmp_path):
    photo(32, 48).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    place = data.index(b"IDAT") - 4
    for name, content in ((b"tEXt", b"a\0b"), (b"zTXt", b"a\0\0b"), (b"iCCP", b"a\0\7b")):
        chunk = struct.pack(">I", len(content)) + name + content + b"\0\0\0\0"  # a wrong checksum
        (tmp_path / "bad.png").write_bytes(data[:place] + chunk + data[place:])
        with pytest.raises((OSError, SyntaxError)):
            Image.open(tmp_path / "bad.png").load()
        found = RadioImageProcessor(do_resize=False)(str(tmp_path / "bad.png"), return_tensors="pt").pixel_values
        assert torch.equal(found[0], tvF.pil_to_tensor(photo(32, 48)) / 255)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # Pillow's own, from 89 million on
def test_files_of_too_many_pixels_are_refused(tmp_path):
    Image.new("1", (12000, 10001)).save(tmp_path / "huge.png")
    with pytest.raises(
        ValueError, match=r"huge.png cannot be read as an image .12000 x 10001 pixels, more than 120,000,000"
    ):
        RadioImageProcessor()(tmp_path / "huge.png")
