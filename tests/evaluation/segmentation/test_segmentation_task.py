"""`eval segmentation` tells sets of data apart, and says in one line what is wrong with one before it trains."""

import itertools
import json
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from PIL import Image

from helpers.segmentation_set import LITTLE, describe, encode, write_set
from helpers.tiny_sam import make_student
from transformers_radio.cli import main
from transformers_radio.evaluation.run import run_task
from transformers_radio.evaluation.segmentation import task
from transformers_radio.evaluation.segmentation.config import SegmentationConfig
from transformers_radio.evaluation.segmentation.inference import encode_grid
from transformers_radio.evaluation.segmentation.probe import segmentation_probe

SHORT = ["probe.iterations=5"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "student"
    make_student().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path):
    folder = write_set(tmp_path / "colors")
    path = tmp_path / "recipe.yaml"
    OmegaConf.save(OmegaConf.create({"data": asdict(describe(folder)), "probe": LITTLE}), path)
    return path


def another_set(tmp_path):
    """Files of the same names with other pixels."""
    folder = shutil.copytree(tmp_path / "colors", tmp_path / "other")
    for path in folder.rglob("images/*/*.png"):
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    return folder


def test_a_finished_result_is_not_that_of_other_data(student, recipe, tmp_path):
    run = lambda *changes, data=None: run_task(  # noqa: E731
        "segmentation", [f"mine={student}"], data, recipe, tmp_path / "out", [*SHORT, *changes]
    )
    (result,) = run()
    moved = shutil.copytree(tmp_path / "colors", tmp_path / "moved")  # with the files' dates
    assert run(data=str(moved)) == [result]
    with pytest.raises(ValueError, match="differs in train files .*validation files"):
        run(data=str(another_set(tmp_path)))
    with pytest.raises(ValueError, match=r"differs in ignore_index \(255 there, 254 here\)"):
        run("data.ignore_index=254")
    (tmp_path / "colors" / "masks" / "validation" / "4.png").touch()
    with pytest.raises(ValueError, match=r"differs in validation files \(\S+ there, \S+ here\)\. Choose"):
        run()


def test_a_stopped_probe_does_not_go_on_with_other_data(tmp_path):
    folder = write_set(tmp_path / "colors")
    calls = itertools.count(1)

    def stopping(images):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return encode(images)

    config = SegmentationConfig(**LITTLE)
    with pytest.raises(KeyboardInterrupt):
        segmentation_probe(stopping, "colors of patches", describe(folder), config, tmp_path / "probe")
    before = (tmp_path / "probe" / "checkpoint.pt").read_bytes()
    other = describe(another_set(tmp_path))
    with pytest.raises(FileExistsError, match="holds another probe; it differs in train files .*validation files"):
        segmentation_probe(encode, "colors of patches", other, config, tmp_path / "probe")
    data = describe(folder)
    data.ignore_index = 254
    with pytest.raises(FileExistsError, match="differs in ignore_index"):
        segmentation_probe(encode, "colors of patches", data, config, tmp_path / "probe")
    assert (tmp_path / "probe" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("split", ["training", "validation"])
def test_a_bad_mask_is_one_line_from_workers_too(split, student, recipe, tmp_path, monkeypatch, capsys):
    path = tmp_path / "colors" / "masks" / split / "3.png"
    mask = np.array(Image.open(path))
    mask[9, 5] = 200
    Image.fromarray(mask).save(path)
    arguments = ["--model", student, "--recipe", recipe, "--output", tmp_path / "out", "probe.num_workers=2"]
    monkeypatch.setattr(sys, "argv", ["transformers-radio", "eval", "segmentation", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    message = str(stopped.value)
    assert message.startswith("error: The mask of 3 has the id 200, but colors has 3 classes") and "\n" not in message
    # before the training, if it can be known there
    assert ("linear probe" in capsys.readouterr().err) == (split == "training")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mask_of_another_size_stops_the_probe_before_it_trains(workers, tmp_path):
    folder = write_set(tmp_path / "colors")
    Image.fromarray(np.ones((5, 6), dtype=np.uint8)).save(folder / "masks" / "validation" / "2.png")
    config = SegmentationConfig(**{**LITTLE, "num_workers": workers})
    with pytest.raises(ValueError, match=r"^The mask of 2 is 5x6 and its image .*must be of one size\.$"):
        segmentation_probe(encode, "colors of patches", describe(folder), config, tmp_path / "probe")
    assert not (tmp_path / "probe").exists()


def test_a_teacher_that_does_not_take_the_crop_is_named_with_the_setting(recipe, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    transformers.BitImageProcessor().save_pretrained(tmp_path / "dino")
    message = r"dino at probe\.crop_size=32: .*no positive multiple of this teacher's patch size 14"
    with pytest.raises(ValueError, match=message):
        run_task("segmentation", [str(tmp_path / "dino")], None, recipe, tmp_path / "out")


def test_the_report_tells_which_data_it_is_of(tmp_path):
    config = SegmentationConfig(**{**LITTLE, "iterations": 5})
    report = segmentation_probe(encode, "m", describe(write_set(tmp_path / "colors")), config, tmp_path / "probe")
    assert report["reduce_labels"] is True and report["train files"] != report["validation files"]
    assert json.loads((tmp_path / "probe" / "settings.json").read_text())["train files"] == report["train files"]


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_bf16_reaches_the_encoder_of_a_student_and_of_a_teacher(kind, student, recipe, tmp_path, monkeypatch):
    """Features differ from float32's by bf16's rounding; a teacher lets no autocast in, its weights are bfloat16."""
    spec = student
    if kind == "teacher":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 8,
            "image_size": 32,
        }
        spec = tmp_path / "dino"
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(spec)
        transformers.BitImageProcessor().save_pretrained(spec)
    used = []

    def watch(encode, name, data, config, folder):
        used.append((encode, config.mixed_precision))
        return segmentation_probe(encode, name, data, config, folder)

    monkeypatch.setattr(task, "segmentation_probe", watch)
    results = []
    for precision in ("no", "bf16"):
        settings = [*SHORT, f"probe.mixed_precision={precision}"]
        results += run_task("segmentation", [f"m={spec}"], None, recipe, tmp_path / precision, settings)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact, halved = (encode_grid(encode, images, precision) for encode, precision in used)
    distance = ((halved - exact).norm() / exact.norm()).item()
    assert 1e-4 < distance < 0.03 and halved.dtype == torch.float32
    assert ["encoder in bf16" in result.protocol for result in results] == [False, True]
    assert results[1].settings["dtype"] == ("float32" if kind == "student" else "bfloat16")
