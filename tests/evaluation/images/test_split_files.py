"""Evaluation reads the files that training and `datasets` read, whatever the folders are called."""

import shutil

import datasets
import pytest
import torch
from PIL import Image

from helpers.classification_world import CLASSES, pictures, png, write_folders, write_parquet, write_tar
from transformers_radio.data import SourceConfig
from transformers_radio.data.source import Source, read_image
from transformers_radio.evaluation import load_labelled_images
from transformers_radio.evaluation.images.labeled import LabeledSplit
from transformers_radio.evaluation.images.split_files import find_split
from transformers_radio.evaluation.segmentation.config import SegmentationData, SplitSource
from transformers_radio.evaluation.segmentation.data import SegmentationSplit
from transformers_radio.visualization.pictures import load_pictures

MADE = pictures(6, seed=0)
WRITERS = {
    "folders": write_folders,
    "tars": write_tar,
    "parquet": lambda folder, split, made: write_parquet(folder, split, made, files=2),
}
PLACES = ["[2021] Summer #1", "100% a*b?", ".hidden", "Vögel", "पक्षी", "a{b},c", "=x y:z"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    for kind, write in WRITERS.items():
        for split in ("train", "validation"):
            write(root / kind, split, MADE)
    return root


@pytest.mark.parametrize("place", PLACES)
def test_any_place_has_the_rows_of_a_plain_one_and_the_images_of_training(place, plain, tmp_path):
    there = shutil.copytree(plain, tmp_path / place)
    for kind in WRITERS:
        rows, expected = (list(LabeledSplit(root / kind, "validation").rows()) for root in (there, plain))
        assert [label for _, label in rows] == [label for _, label in expected] and len(rows) == 6
        assert [read_image(image) for image, _ in rows] == [read_image(image) for image, _ in expected]
        assert LabeledSplit(there / kind, "train").count() == 6
        source = Source(SourceConfig(str(there / kind), "validation"))
        trained = [source.read(image) for shard in range(len(source.shards)) for _, image in source.records(shard)]
        assert sorted(trained) == sorted(read_image(image) for image, _ in rows)
        assert len(load_pictures(str(there / kind), 6)) == 6


@pytest.mark.parametrize("place", PLACES[:2])
def test_tables_of_masks_in_any_place(place, tmp_path):
    image, mask = Image.new("RGB", (8, 6), (9, 8, 7)), Image.new("L", (8, 6), 1)
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    (tmp_path / place).mkdir()
    table = datasets.Dataset.from_dict({"image": [image], "annotation": [mask]}, features=features)
    table.to_parquet(tmp_path / place / "val.parquet")
    parts = {"validation": [SplitSource(split="validation")]}
    data = SegmentationData(name="x", path=str(tmp_path / place), classes=["a", "b"], splits=parts)
    (sample,) = SegmentationSplit(data, "validation")
    assert sample.mask.unique().tolist() == [1] and sample.image[:, 0, 0].tolist() == [9, 8, 7]


LAYOUTS = {
    "a folder a split": ["train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"],
    "splits further down": [
        "images/train/a/1.png",
        "images/train/b/2.png",
        "images/dev/a/3.png",
        "images/dev/b/4.png",
    ],
    "words with signs": ["my-train set/a/1.png", "my-train set/b/2.png", "valid_2/a/3.png", "valid_2/b/4.png"],
    "names that begin so": ["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"],
    "names that have it inside": ["birds_train.parquet", "birds_valid.parquet", "birds_test.parquet"],
    "the Hub's": ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "no split": ["a/1.png", "b/2.png"],
}


@pytest.mark.parametrize("files", LAYOUTS.values(), ids=LAYOUTS)
def test_splits_are_those_of_datasets(files, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(MADE[0][0]))
    expected = datasets.load_dataset_builder(str(tmp_path)).config.data_files
    assert "train" in expected and "train" not in (expected.keys() - {"train"})
    for split in ("train", "validation", "test"):
        if split in expected:
            assert find_split(tmp_path, split).files == sorted(expected[split])
        else:
            with pytest.raises(ValueError, match=f"has no split '{split}'"):
                find_split(tmp_path, split)


def test_no_image_of_another_split_is_taken_for_one_of_training(tmp_path):
    for name in ("images/val/a/1.png", "images/val/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="has no split 'train'"):
        find_split(tmp_path, "train")


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("train/test/1.png", "train/dev set/2.png", "valid/test/3.png", "valid/dev set/4.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png(MADE[0][0]))
    split = LabeledSplit(tmp_path, "validation")
    assert split.class_names == ["dev set", "test"] and [label for _, label in split.rows()] == [0, 1]


def test_a_label_means_the_same_in_all_splits_and_images_without_a_class_have_none(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "val/b/2.png", "val/c/2.png", "test/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(MADE[0][0]))
    split = LabeledSplit(tmp_path, "val")
    assert split.class_names == ["a", "b", "c"] and [label for _, label in split.rows()] == [1, 2]
    with pytest.raises(ValueError, match="no label column"):
        LabeledSplit(tmp_path, "test")


def test_patterns_files_and_tables_of_labels_beside_the_images(plain, tmp_path):
    expected = load_labelled_images(plain / "parquet", "train", 16)
    for source in ("parquet/train*.parquet", "parquet/tra[i]n-*"):
        assert torch.equal(load_labelled_images(plain / source, "train", 16).images, expected.images)
    one = load_labelled_images(plain / "parquet" / "train-00000-of-00002.parquet", "train", 16)
    assert torch.equal(one.images, expected.images[:3])
    for number, (pixels, _) in enumerate(MADE):
        (tmp_path / f"{number}.png").write_bytes(png(pixels))
    rows = "".join(f"{number}.png,{label}\n" for number, (_, label) in enumerate(MADE))
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}")
    loaded = load_labelled_images(tmp_path, "train", 16)
    assert loaded.labels.tolist() == [label for _, label in MADE] and torch.equal(loaded.images, expected.images)


def test_a_file_met_by_two_names_of_its_split_is_one(tmp_path):
    """`datasets` lists it twice."""
    for name in ("train/train-a/1.png", "train/train-b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png(MADE[0][0]) if name.endswith("1.png") else b"")
    loaded = load_labelled_images(tmp_path, "train", 16)
    assert len(loaded.images) == 1 and loaded.skipped == {"missing": 1}


def test_class_names_are_those_of_the_folders(plain):
    assert LabeledSplit(plain / "folders", "train").class_names == sorted(CLASSES)
