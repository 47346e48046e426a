"""Whatever file of a stranger is read, code in it does not run, and one line says which file it was."""

import json
import shutil

import pytest
import torch

from helpers.bombs import Bomb, numpy_file, old_torch_file, plain_pickle, torch_file
from helpers.sample_images import picture
from helpers.tiny_radio import build_with_adaptors
from helpers.tiny_recipe import RECIPE
from transformers_radio import RadioModel
from transformers_radio.evaluation.segmentation import probe
from transformers_radio.hub.convert import load_nvidia_checkpoint
from transformers_radio.teachers import build_teacher
from transformers_radio.training import load_recipe, train
from transformers_radio.training.run import checkpoint

TEACHERS = {
    "segment_anything": "{file}",
    "timm": "vit_tiny_patch16_224:{file}",
    "open_clip": "ViT-B-32:{file}",
}


@pytest.fixture
def trace(tmp_path):
    """The folder that a bomb makes."""
    yield tmp_path / "trace"
    assert not (tmp_path / "trace").exists(), "code in a file was run"


def test_the_bomb_would_go_off(tmp_path):
    torch.load(torch_file(tmp_path / "bomb.pt", tmp_path / "trace"), weights_only=False)
    assert (tmp_path / "trace").is_dir()


@pytest.mark.parametrize("write", [torch_file, old_torch_file, plain_pickle], ids=lambda write: write.__name__)
@pytest.mark.parametrize("kind", TEACHERS)
def test_files_of_teachers(kind, write, tmp_path, trace):
    file = write(tmp_path / "weights.pth", trace)
    with pytest.raises(ValueError, match="weights.pth .*pickled objects"):
        build_teacher(kind, TEACHERS[kind].format(file=file))


@pytest.mark.parametrize("suffix", [".npz", ".npy"])
def test_numpy_files_of_teachers(suffix, tmp_path, trace):
    file = numpy_file(tmp_path / f"weights{suffix}", trace)
    for kind in ("open_clip", "timm"):
        with pytest.raises(ValueError, match="weights"):
            build_teacher(kind, TEACHERS[kind].format(file=file))


def test_folders_of_transformers(tmp_path, trace):
    folder = tmp_path / "student"
    build_with_adaptors().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch_file(folder / "pytorch_model.bin", trace)
    with pytest.raises(ValueError, match="student"):
        RadioModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="student"):
        build_teacher("transformers", str(folder))


def test_released_checkpoints(tmp_path, trace):
    for write in (torch_file, old_torch_file, plain_pickle):
        with pytest.raises(ValueError, match="radio.pth.tar is not read: .*pickled objects can run code"):
            load_nvidia_checkpoint(write(tmp_path / "radio.pth.tar", trace))


def test_the_checkpoint_of_a_probe(tmp_path, trace):
    head = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="head.pt .*pickled objects"):
        probe._load_checkpoint(torch_file(tmp_path / "head.pt", trace), head, torch.optim.AdamW(head.parameters()))


@pytest.mark.parametrize("file", ["optimizer.pt", "random_0.pt"])
def test_the_checkpoint_of_a_run(file, tmp_path, trace):
    """The checksums beside it are those of the changed file: whoever sends a checkpoint writes them too."""
    (tmp_path / "images").mkdir()
    for number in range(8):
        picture(number).save(tmp_path / f"images/{number}.png")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(output=tmp_path / "run", images=tmp_path / "images"))
    options = ["stages.main.steps=4", "checkpoints.every_steps=2", "stages.main.warmup_steps=1"]
    train(load_recipe(path, options))
    shutil.rmtree(tmp_path / "run/student")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    left = tmp_path / "run/checkpoints/step-00000002"
    torch.save({"state": Bomb(trace)}, left / "training_state" / file)
    (left / checkpoint.MANIFEST).unlink()
    checkpoint._write_manifest(left)
    assert json.loads((left / checkpoint.MANIFEST).read_text())
    with pytest.raises(ValueError, match=f"{file} .*pickled objects"):
        train(load_recipe(path, options))
