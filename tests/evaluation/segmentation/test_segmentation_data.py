"""Sets in the formats of ADE20K, PASCAL VOC and `datasets`, with known pixels and known faults."""

import io
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.paths import ROOT
from transformers_radio.evaluation.segmentation.config import (
    SegmentationData,
    SplitSource,
    load_segmentation_task,
)
from transformers_radio.evaluation.segmentation.data import (
    SegmentationSplit,
)

RECIPES = ROOT / "recipes" / "evaluation"


def save(path, pixels, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if palette:
        picture = picture.convert("P")
        picture.putdata(pixels.ravel().tolist())
        picture.putpalette([value for index in range(256) for value in (255 - index, index, 7)])
    picture.save(path)


def scene(number, height=12, width=10):
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), rng.integers(
        0, 3, (height, width), dtype=np.uint8
    )


@pytest.fixture
def ade(tmp_path):
    """Three training images and one for validation, as ADE20K is unpacked; ids 0 (none) to 2."""
    for split, numbers in (("training", (1, 2, 3)), ("validation", (4,))):
        for number in numbers:
            image, mask = scene(number)
            save(tmp_path / "images" / split / f"ADE_{number}.png", image)
            save(tmp_path / "annotations" / split / f"ADE_{number}.png", mask)
    return SegmentationData(
        name="little ADE",
        path=str(tmp_path),
        classes=["wall", "sky"],
        reduce_labels=True,
        splits={
            "train": [SplitSource(images="images/training", masks="annotations/training")],
            "validation": [SplitSource(images="images/validation", masks="annotations/validation")],
        },
    )


def test_ade20k_folders_with_reduced_labels(ade):
    train = SegmentationSplit(ade, "train")
    assert len(train) == 3 and len(SegmentationSplit(ade, "validation")) == 1
    for sample, number in zip(train, (1, 2, 3), strict=True):
        image, mask = scene(number)
        assert sample.key == f"ADE_{number}" and np.array_equal(sample.image.permute(1, 2, 0), image)
        expected = np.where(mask == 0, 255, mask.astype(int) - 1)
        assert sample.mask.dtype == torch.int64 and np.array_equal(sample.mask, expected)


def test_voc_layout_reads_palette_indices_of_the_listed_names(tmp_path):
    for number in range(4):
        image, mask = scene(number)
        mask[0] = 255
        save(tmp_path / "JPEGImages" / f"2007_{number}.jpg", image)
        save(tmp_path / "SegmentationClass" / f"2007_{number}.png", mask, palette=True)
    (tmp_path / "train.txt").write_text("2007_2\n2007_0\n")
    (tmp_path / "more.txt").write_text("2007_3\n")
    parts = [
        SplitSource(images="JPEGImages", masks="SegmentationClass", names=names) for names in ("train.txt", "more.txt")
    ]
    data = SegmentationData(name="VOC", path=str(tmp_path), classes=["a", "b", "c"], splits={"train": parts})
    split = SegmentationSplit(data, "train")
    assert [split[index].key for index in range(3)] == ["2007_2", "2007_0", "2007_3"]
    assert Image.open(tmp_path / "SegmentationClass" / "2007_0.png").mode == "P"
    expected = scene(0)[1]
    expected[0] = 255
    assert np.array_equal(split[1].mask, expected)
    (tmp_path / "train.txt").write_text("2007_9\n")
    with pytest.raises(FileNotFoundError, match="1 images named.*2007_9"):
        SegmentationSplit(data, "train")


def test_parquet_columns(tmp_path):
    images, masks = zip(*(scene(number) for number in range(3)), strict=True)
    columns = {"photo": list(map(Image.fromarray, images)), "labels": list(map(Image.fromarray, masks))}
    features = datasets.Features({"photo": datasets.Image(), "labels": datasets.Image()})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    part = SplitSource(split="train", image_column="photo", mask_column="labels")
    data = SegmentationData(name="table", path=str(tmp_path), classes=["a", "b", "c"], splits={"train": [part]})
    split = SegmentationSplit(data, "train")
    assert len(split) == 3
    for sample, image, mask in zip(split, images, masks, strict=True):
        assert np.array_equal(sample.image.permute(1, 2, 0), image) and np.array_equal(sample.mask, mask)
    part.mask_column = "annotation"
    with pytest.raises(ValueError, match="no column 'annotation'.*photo, labels"):
        SegmentationSplit(data, "train")


def test_webdataset_tars_with_mask_members(tmp_path):
    with tarfile.open(tmp_path / "validation-000000.tar", "w") as tar:
        for number in range(3):
            for extension, pixels in zip(("png", "semantic.png"), scene(number), strict=True):
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "PNG")
                member = tarfile.TarInfo(f"scene-{number}.{extension}")
                member.size = len(content.getvalue())
                content.seek(0)
                tar.addfile(member, content)
    part = SplitSource(split="validation", image_column="png", mask_column="semantic.png")
    data = SegmentationData(name="tars", path=str(tmp_path), classes=["a", "b", "c"], splits={"validation": [part]})
    split = SegmentationSplit(data, "validation")
    assert [np.array_equal(split[number].mask, scene(number)[1]) for number in range(len(split))] == [True] * 3


def test_masks_of_16_bits(ade, tmp_path):
    save(tmp_path / "annotations" / "training" / "ADE_1.png", np.full((12, 10), 300, dtype=np.uint16))
    ade.classes = [str(number) for number in range(400)]
    assert (SegmentationSplit(ade, "train")[0].mask == 299).all()


def test_faults_are_named(ade, tmp_path):
    masks = tmp_path / "annotations" / "training"
    train = SegmentationSplit(ade, "train")
    save(masks / "ADE_1.png", np.full((12, 10), 7, dtype=np.uint8))
    with pytest.raises(ValueError, match="mask of ADE_1 has the id 7.*little ADE has 2 classes: expected 1 to 2"):
        train[0]
    save(masks / "ADE_1.png", np.zeros((10, 12), dtype=np.uint8))
    with pytest.raises(ValueError, match="mask of ADE_1 is 10x12 and its image 12x10"):
        train[0]
    save(masks / "ADE_1.png", np.zeros((12, 10, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="mask of ADE_1 has mode RGB.*not colors"):
        train[0]
    (masks / "ADE_1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="mask of ADE_1 cannot be read"):
        train[0]
    image = tmp_path / "images" / "training" / "ADE_2.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(ValueError, match="image ADE_2 of little ADE cannot be used"):
        train[1]
    (masks / "ADE_3.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 images have no mask.*ADE_3.png"):
        SegmentationSplit(ade, "train")
    for path in (tmp_path / "images" / "training").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="split 'train' of little ADE.*is empty"):
        SegmentationSplit(ade, "train")
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        SegmentationSplit(ade, "test")
    ade.path = str(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no folder.*elsewhere.*data.path"):
        SegmentationSplit(ade, "validation")


def test_the_real_sets_are_wired():
    ade = load_segmentation_task(RECIPES / "ade20k.yaml", ["probe.iterations=80000", "data.path=/there"])
    assert len(ade.data.classes) == len(set(ade.data.classes)) == 150 and ade.data.reduce_labels
    assert ade.data.classes[0] == "wall" and ade.data.classes[12] == "person" and ade.data.classes[-1] == "flag"
    assert ade.probe.iterations == 80_000 and ade.data.path == "/there"
    voc = load_segmentation_task(RECIPES / "voc2012.yaml")
    assert ade.probe.mixed_precision == voc.probe.mixed_precision == "bf16"
    assert voc.probe.test_protocol == "512 pixels, sliding window 512, stride 341; encoder in bf16"
    exact = load_segmentation_task(RECIPES / "voc2012.yaml", ["probe.mixed_precision=no"])  # which YAML reads as false
    assert exact.probe.mixed_precision == "no" and "bf16" not in exact.probe.test_protocol
    assert len(voc.data.classes) == 21 and voc.data.classes[15] == "person" and not voc.data.reduce_labels
    assert voc.probe.iterations == 160_000 and (voc.probe.crop_size, voc.probe.stride) == (512, 341)
    for task in (ade, voc):
        assert task.data.license and task.data.ignore_index == 255 and set(task.data.splits) == {"train", "validation"}


@pytest.mark.parametrize(("iterations", "warmup"), [(160_000, 1500), (1501, 1500), (1500, 150), (100, 10), (5, 0)])
def test_a_short_probe_warms_up_for_a_tenth(iterations, warmup):
    probe = load_segmentation_task(RECIPES / "ade20k.yaml", [f"probe.iterations={iterations}"]).probe
    assert probe.warmup == probe.settings()["warmup_iterations"] == warmup
    assert probe.learning_rate_at(warmup) == pytest.approx(1e-3)


def test_bad_recipes_are_named():
    with pytest.raises(ValueError, match="iteration_count"):
        load_segmentation_task(RECIPES / "ade20k.yaml", ["probe.iteration_count=5"])
    with pytest.raises(ValueError, match="^probe.warmup_iterations is 1500; expected 0 to 99"):
        load_segmentation_task(RECIPES / "ade20k.yaml", ["probe.iterations=100", "probe.warmup_iterations=1500"])
    with pytest.raises(ValueError, match="^probe.mixed_precision is 'fp8'"):
        load_segmentation_task(RECIPES / "ade20k.yaml", ["probe.mixed_precision=fp8"])
    with pytest.raises(ValueError, match="crop_size is 518, not a multiple of size_divisor.*use 512"):
        load_segmentation_task(RECIPES / "ade20k.yaml", ["probe.crop_size=518"])
    with pytest.raises(ValueError, match="test_mode is 'window'; expected one of slide, whole"):
        load_segmentation_task(RECIPES / "ade20k.yaml", ["probe.test_mode=window"])
