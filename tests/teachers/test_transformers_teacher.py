"""transformers teachers against transformers' own forward, from save_pretrained folders."""

import pytest
import torch
import transformers

from transformers_radio.teachers import build_teacher

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 8,
}


@pytest.fixture
def save(tmp_path, randomize):
    """Random weights into a model, then the model and its image processor into a folder; returns the folder's path."""

    def to_folder(model, **processor):
        randomize(model).save_pretrained(tmp_path)
        settings = {"image_mean": MEAN, "image_std": STD, **processor}
        transformers.CLIPImageProcessor(**settings).save_pretrained(tmp_path)
        return str(tmp_path)

    return to_folder


def normalised(batch):
    return (batch - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def dinov2(**kwargs):
    return transformers.Dinov2Model(transformers.Dinov2Config(**VIT, image_size=48, mlp_ratio=2, **kwargs))


@torch.no_grad()
def test_dinov2(save, images, assert_contract):
    original = dinov2()
    teacher = build_teacher("transformers", save(original))
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size) == (32, 32, 48, 8)
    with torch.enable_grad():
        output = assert_contract(teacher)
    tokens = original(normalised(images(48))).last_hidden_state
    torch.testing.assert_close(output.summary, tokens[:, 0])
    torch.testing.assert_close(output.features, tokens[:, 1:])
