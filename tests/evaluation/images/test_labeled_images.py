"""Loading against torchvision's resize and against files with known faults; extraction against a plain loop."""

import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from transformers_radio.evaluation import extract_summaries, load_labelled_images
from transformers_radio.evaluation.images.labeled import LabeledSplit
from transformers_radio.evaluation.images.resize import cover_image, stretch_image


def encode_image(pixels: np.ndarray, format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def smooth_image(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_one_number_squeezes_into_a_square_as_torchvision_does():
    image = smooth_image(90, 120)
    expected = v2.functional.pil_to_tensor(v2.functional.resize(image, [48, 48], v2.InterpolationMode.BICUBIC))
    assert torch.equal(stretch_image(image, (48, 48)), expected)


@pytest.mark.parametrize("source_size", [(96, 160), (200, 80), (24, 40)])
def test_two_numbers_cover_and_crop_the_center_as_torchvision_does(source_size):
    image = smooth_image(*source_size)
    scale = max(48 / source_size[0], 40 / source_size[1])  # 0.5 or 2, so that no pixel lies between two
    covering = [int(side * scale) for side in source_size]
    resized = v2.functional.resize(image, covering, v2.InterpolationMode.BICUBIC)
    expected = v2.functional.pil_to_tensor(v2.functional.center_crop(resized, [48, 40]))
    difference = (cover_image(image, (48, 40)).int() - expected.int()).abs()
    assert difference.shape == (3, 48, 40)
    # torchvision's filter still sees the pixels beyond the cut; away from it the two agree.
    assert difference[:, 4:-4, 4:-4].max() <= 1 and difference.max() < 25


def test_class_folders_keep_names_and_count_the_broken_files(tmp_path, caplog):
    for label, name in enumerate(["ant", "bee"]):
        folder = tmp_path / "validation" / name
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 30), (100 * label, 10 * number, 0)).save(folder / f"{number}.png")
    (tmp_path / "validation" / "bee" / "1.png").write_bytes(b"no picture")
    whole = (tmp_path / "validation" / "ant" / "2.png").read_bytes()
    (tmp_path / "validation" / "ant" / "2.png").write_bytes(whole[: len(whole) // 2])
    loaded = load_labelled_images(tmp_path, "validation", 16)
    assert loaded.class_names == ["ant", "bee"]
    assert loaded.images.dtype == torch.uint8 and loaded.images.shape == (4, 3, 16, 16)
    colors = sorted(
        (label, *image[:2, 0, 0].tolist()) for image, label in zip(loaded.images, loaded.labels.tolist(), strict=True)
    )
    assert colors == [(0, 0, 0), (0, 0, 10), (1, 100, 0), (1, 100, 20)]
    assert loaded.skipped == {"truncated": 1, "undecodable": 1}
    assert "skipped 2 of 6 images" in caplog.text


def test_webdataset_tars_with_cls(tmp_path):
    for split, count in (("train", 5), ("validation", 3)):
        with tarfile.open(tmp_path / f"{split}-000000.tar", "w") as tar:
            for number in range(count):
                pixels = np.full((20, 20, 3), 30 * number, dtype=np.uint8)
                mask = np.full((20, 20), 255, dtype=np.uint8)
                members = {"semantic.png": encode_image(mask, "PNG"), "jpg": encode_image(pixels, "JPEG")}
                for extension, content in {**members, "cls": str(number % 2).encode()}.items():
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    loaded = load_labelled_images(tmp_path, "validation", (16, 16))
    assert loaded.labels.tolist() == [0, 1, 0] and loaded.skipped == {}
    assert loaded.images[:, 0, 8, 8].tolist() == pytest.approx([0, 30, 60], abs=2)
    assert len(load_labelled_images(tmp_path, "train", 16).labels) == 5
    assert load_labelled_images(tmp_path, "train", 16, limit=2).labels.tolist() == [0, 1]


def test_parquet_with_named_columns_and_refused_sources(tmp_path):
    png = {"bytes": encode_image(np.zeros((8, 8, 3), np.uint8), "PNG"), "path": None}
    data = datasets.Dataset.from_dict({"photo": [png] * 2, "kind": [3, 7], "blank": [-1, -1], "empty": [None, None]})
    data = data.cast_column("photo", datasets.Image()).cast_column("empty", datasets.Image())
    data.to_parquet(tmp_path / "train-00000.parquet")
    loaded = load_labelled_images(tmp_path, "train", 8, image_column="photo", label_column="kind")
    assert loaded.labels.tolist() == [3, 7] and loaded.class_names is None
    with pytest.raises(ValueError, match="no image column.*photo.*image_column"):
        load_labelled_images(tmp_path, "train", 8)
    with pytest.raises(ValueError, match="-1 in column 'blank'.*not a class index"):
        load_labelled_images(tmp_path, "train", 8, image_column="photo", label_column="blank")
    with pytest.raises(ValueError, match="no readable image.*missing"):
        load_labelled_images(tmp_path, "train", 8, image_column="empty", label_column="kind")
    with pytest.raises(ValueError, match="limit is 0"):
        load_labelled_images(tmp_path, "train", 8, limit=0)
    with pytest.raises(ValueError, match="image_size is 0"):
        load_labelled_images(tmp_path, "train", 0)


def test_extraction_keeps_order_and_scale_over_uneven_batches():
    images = torch.randint(0, 256, (7, 3, 4, 4), dtype=torch.uint8)
    expected = torch.stack([(image.double() / 255).mean(dim=(1, 2)) for image in images])
    for source in (images, [images[:2], images[2:]]):
        summaries = extract_summaries(lambda x: x.mean(dim=(2, 3)).double(), source, batch_size=3)
        assert summaries.dtype == torch.float32
        torch.testing.assert_close(summaries, expected.float())


def test_extraction_can_feed_a_trained_head():
    summaries = extract_summaries(torch.nn.Flatten(), torch.ones(2, 3, 2, 2, dtype=torch.uint8))
    torch.nn.Linear(12, 1)(summaries).sum().backward()  # inference-mode tensors would raise here


def test_extraction_refuses_what_it_would_get_wrong():
    images = torch.ones(2, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="float32.*expected torch.uint8"):
        extract_summaries(torch.nn.Flatten(), images.float())
    with pytest.raises(ValueError, match=r"returned \(2, 3, 2, 2\)"):
        extract_summaries(torch.nn.Identity(), images)
    with pytest.raises(ValueError, match="NaN"):
        extract_summaries(lambda x: x.flatten(1) * torch.nan, images)
    with pytest.raises(ValueError, match="no images"):
        extract_summaries(torch.nn.Flatten(), images[:0])


def test_tars_may_mix_extensions_and_hold_damaged_captions(tmp_path):
    """As in training: what lies beside an image does not matter, but for its label."""
    formats = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "JPG": "JPEG"}
    with tarfile.open(tmp_path / "validation-0.tar", "w") as tar:
        for number in range(30):
            extension = "jpg" if number < 24 else list(formats)[number % 4]
            buffer = io.BytesIO()
            Image.new("RGB", (20, 20), (number * 8, 0, 0)).save(buffer, formats[extension])
            caption = "Straße".encode("latin-1") if number == 26 else b"fine"
            files = {extension: buffer.getvalue(), "txt": caption, "json": b"{", "cls": str(number % 3).encode()}
            for name, content in files.items():
                member = tarfile.TarInfo(f"{number:04d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    loaded = load_labelled_images(tmp_path, "validation", 8)
    assert loaded.labels.tolist() == [number % 3 for number in range(30)] and not loaded.skipped
    assert loaded.images[:, 0].float().mean(dim=(1, 2)).tolist() == pytest.approx([n * 8 for n in range(30)], abs=4)
    split = LabeledSplit(tmp_path, "validation", limit=5)
    assert [label for _, label in split.rows()] == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="'fine' in column 'txt' of .* is not a class index"):
        list(LabeledSplit(tmp_path, "validation", label_column="txt").rows())
