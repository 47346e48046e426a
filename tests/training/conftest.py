import numpy as np
import pytest
import torch
from PIL import Image

from helpers.forked import Forked

# As in the processes that the tests start: bits are equal only for the same number of threads.
torch.set_num_threads(1)

RECIPE = """
output_dir: {output}
student:
  size: vit-ti-16
  config: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, mlp_ratio: 2.0, patch_size: 8,
           max_img_size: 64, num_registers: 1, pos_dropout: 0.1}}
teachers:
  clip: {{type: python, checkpoint: "helpers.tiny_teachers:PatchTeacher", image_size: 24, options: {{width: 16}}}}
  sam:
    type: python
    checkpoint: "helpers.tiny_teachers:PatchTeacher"
    image_size: 48
    options: {{width: 20, summary: false}}
data: {{path: {images}, num_workers: 0, shuffle_window: 8}}
stages:
  main: {{steps: 12, resolution: 32, batch_size: 4, warmup_steps: 2}}
checkpoints: {{every_steps: 3, keep: 2}}
log_every_steps: 2
tracker: null
"""


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
