"""A fused student computes the same with fewer operations, and is for inference alone."""

import copy

import pytest
import torch
from torch import nn

from transformers_radio import RadioConfig, RadioModel, RadioTimmConfig, RadioTimmModel

ADAPTORS = {"clip": {"summary_dim": 12, "feature_dim": 12, "hidden_dim": 16, "summary_token": 0}}


def vit(**fields):
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2.0, "max_img_size": 96}
    config = RadioConfig(**{**shape, "num_cls_tokens": 1, "num_registers": 2, "adaptors": ADAPTORS, **fields})
    return randomize(RadioModel(config))


def timm_student(size):
    return randomize(RadioTimmModel(RadioTimmConfig.from_size(size, adaptors=ADAPTORS)))


def randomize(model):
    """Away from zeros and ones, with which much would be equal by chance; statistics stay positive."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_floating_point() and not name.startswith("input_conditioner"):
                weight += 0.1 * torch.rand(weight.shape, generator=generator)
    return model.eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "fields", [{}, {"qkv_bias": False}, {"attn_implementation": "eager"}, {"window_size": 2}, {"use_swiglu_ffn": True}]
)
def test_a_fused_vit_gives_the_same(fields):
    model = vit(**fields)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    fused = copy.deepcopy(model).fuse()
    ours, expected = fused(images), model(images)
    close(ours.features, expected.features)
    close(ours.summary, expected.summary)
    close(ours.adaptors["clip"].features, expected.adaptors["clip"].features)
    weights = [layer.attention.qkv_proj.weight.shape for layer in fused.encoder.layer]
    assert weights == [(96, 32)] * 3  # one product in place of three, and none of the three is kept
    assert not [name for name, _ in fused.named_parameters() if "q_proj" in name or "lambda1" in name]
    close(fused.fuse()(images).features, expected.features)


@torch.no_grad()
def test_a_fused_vit_takes_packed_images():
    model, grids = vit(), torch.tensor([[2, 3], [4, 1]])
    patches = torch.rand(10, 768, generator=torch.Generator().manual_seed(1))
    expected = model(patches, image_grid_hw=grids)
    close(model.fuse()(patches, image_grid_hw=grids).features, expected.features)


@torch.no_grad()
@pytest.mark.parametrize("size", ["fastvit-2m", "repvit-2m", "convnext-2m"])
def test_a_fused_network_of_timm_gives_the_same(size):
    model = timm_student(size)
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    fused = copy.deepcopy(model).fuse()
    ours, expected = fused(images), model(images)
    scale = expected.features.abs().max()
    close(ours.features / scale, expected.features / scale)
    close(ours.summary / scale, expected.summary / scale)
    norms = [sum(isinstance(part, nn.BatchNorm2d) for part in one.modules()) for one in (fused, model)]
    assert norms[0] < norms[1] or norms == [0, 0]


@pytest.mark.parametrize("make", [vit, lambda: timm_student("repvit-2m")])
def test_a_fused_model_is_for_inference(make, tmp_path):
    model = make()
    with pytest.raises(ValueError, match=r"call model.eval\(\) before"):
        model.train().fuse()
    model.eval().fuse()
    with pytest.raises(ValueError, match="load it again to train it"):
        model.train()
    with pytest.raises(ValueError, match=r"save it before model.fuse\(\)"):
        model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match=r"choose its heads before model.fuse\(\)"):
        model.with_adaptors([])
    assert not list(tmp_path.iterdir())
