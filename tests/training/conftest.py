import numpy as np
import pytest
import torch
from PIL import Image

from helpers.forked import Forked
from helpers.tiny_recipe import RECIPE

# As in the processes that the tests start: bits are equal only for the same number of threads.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 small photographs-to-be in nested folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for index in range(24):
        path = folder / f"part{index % 3}" / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def recipe_text():
    return RECIPE


@pytest.fixture
def make_recipe(tmp_path, image_folder):
    """Writes the tiny recipe for an output folder's name and returns the file."""

    def make(name="run", images=image_folder):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(output=tmp_path / name, images=images))
        return path

    return make


@pytest.fixture
def start_training():
    """Starts `python -m transformers_radio.training`; the caller waits, signals or kills."""

    def start(recipe, *overrides):
        return Forked(recipe, *overrides, CUDA_VISIBLE_DEVICES="")

    return start
