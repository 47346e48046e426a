"""`eval features`: which images it takes, and that a result is theirs alone."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_radio.evaluation.features.task import FeaturesConfig, _read
from transformers_radio.evaluation.result import Result
from transformers_radio.evaluation.run import load_config, run_task
from transformers_radio.modeling import RadioConfig, RadioModel

CLASSES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Its position table is constant."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 8, "max_img_size": 64}
    model = RadioModel(RadioConfig(**sizes, preferred_resolution=32))
    with torch.no_grad():
        model.embeddings.position_embedding.fill_(0.1)
    folder = tmp_path_factory.mktemp("students") / "student"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tmp_path):
    """Class folders of training and, in folders called val, of validation; the red channel is the class."""
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                color = (60 * label, 10 * number, 255 if split == "val" else 0)
                Image.new("RGB", (40, 32), color).save(folder / f"{number}.png")
    return tmp_path / "animals"


def pixels(folder, *overrides):
    """(label, number, is of validation) of the images that are taken."""
    files, _ = _read(load_config(FeaturesConfig, str(folder), None, list(overrides)))
    colors = [Image.open(io.BytesIO(file)).getpixel((0, 0)) for file in files]
    return [(red // 60, green // 10, blue == 255) for red, green, blue in colors]


def test_images_come_from_all_classes_of_the_split_that_is_called_val(folders):
    taken = pixels(folders, "images=12")
    assert len(set(taken)) == 12 and {label for label, _, _ in taken} == set(range(4))
    assert all(of_validation for _, _, of_validation in taken)
    assert taken == pixels(folders, "images=12")
    assert not any(of_validation for _, _, of_validation in pixels(folders, "images=12", "split=train"))
    assert len(pixels(folders, "images=100")) == 48
    (folders / "val").rename(folders / "validation")
    assert sorted(pixels(folders, "images=100")) == sorted((a, b, True) for a in range(4) for b in range(12))


def test_a_split_that_is_not_there_is_named_with_the_setting_of_this_task(folders):
    with pytest.raises(ValueError, match=r"^data='.*' has no split 'test'.*train, val: set split to one of them\.$"):
        pixels(folders, "split=test")


def test_a_result_is_of_its_images(student, folders, tmp_path):
    run = lambda: run_task("features", [f"m={student}"], str(folders), None, tmp_path / "out", ["images=100"])  # noqa: E731
    (result,) = run()
    assert run() == [result] and result.settings["seed"] == 0
    noise = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folders / "val" / "bee" / "3.png")
    with pytest.raises(ValueError, match=r"it differs in files \("):
        run()


def test_a_constant_position_table_has_no_noise(student, folders, tmp_path):
    (result,) = run_task("features", [f"m={student}"], str(folders), None, tmp_path / "out", ["images=4"])
    assert not any("Position noise" in name for name in result.metrics) and "Norm, median" in result.metrics
    assert Result.read(tmp_path / "out" / "m" / "features.animals.json") == result
    assert (tmp_path / "out" / "m" / "features.animals.png").exists()
