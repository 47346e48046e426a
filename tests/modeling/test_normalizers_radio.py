"""The feature normalizer of a released variant acts wherever the features come out."""

import pytest
import torch

from helpers.tiny_radio import build
from transformers_radio import RadioBackbone, RadioBackboneConfig, RadioVisionTower, load_student


@pytest.fixture
def model():
    model = build(feature_normalizer=True)
    for statistic in model.feature_normalizer.buffers():
        statistic.add_(torch.randn(statistic.shape, generator=torch.Generator().manual_seed(1)))
    return model


@torch.no_grad()
def test_features_are_normalized_and_the_prefix_is_not(model):
    plain = build()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "normalizer" not in k})
    images = torch.rand(2, 3, 64, 48)
    ours, without = model(images), plain(images)
    mean, tx = model.feature_normalizer.mean, model.feature_normalizer.tx
    wanted = torch.stack([torch.stack([tx @ (token - mean) for token in image]) for image in without.features])
    torch.testing.assert_close(ours.features, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.summary, without.summary)
    assert torch.equal(ours.last_hidden_state[:, 5:], ours.features)


@torch.no_grad()
def test_packed_images_backbone_and_tower_give_the_same_features(model, tmp_path):
    images = torch.rand(1, 3, 64, 48)
    features = model(images).features
    patches = images.unflatten(3, (-1, 16)).unflatten(2, (-1, 16)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
    packed = model(patches, image_grid_hw=torch.tensor([[4, 3]]))
    torch.testing.assert_close(packed.features, features[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.last_hidden_state[5:], features[0], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    config = RadioBackboneConfig.from_pretrained(tmp_path, out_indices=[1, 3])
    backbone = load_student(RadioBackbone(config), tmp_path).eval()
    first, last = backbone(images).feature_maps
    torch.testing.assert_close(last, model.features_to_grid(features, 64, 48), atol=1e-5, rtol=1e-5)
    hidden = model(images, output_hidden_states=True).hidden_states[1][:, 5:]
    torch.testing.assert_close(first, model.features_to_grid(hidden, 64, 48), atol=1e-5, rtol=1e-5)
    tower = RadioVisionTower.from_radio(model).eval()
    out = tower(images, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[-1][:, 1:], features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.last_hidden_state[:, 1:], features, atol=1e-5, rtol=1e-5)
