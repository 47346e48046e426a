"""A fused student computes the same with fewer operations, and is for inference alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

from transformers_radio import RadioConfig, RadioModel, RadioTimmConfig, RadioTimmModel
from transformers_radio.evaluation.speed.cost import count_flops, peak_memory

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


def packed_model():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no units for bfloat16, so nothing is packed")
    model = vit().bfloat16()
    return model, copy.deepcopy(model).fuse()


def calls(run):
    """What `run` returns, and how many products with packed weights it made."""
    with torch.profiler.profile() as profile:
        result = run()
    return result, sum(event.count for event in profile.key_averages() if "linear_pointwise" in event.key)


def test_a_fused_student_in_bfloat16_packs_its_weights_for_the_cpu():
    model, fused = packed_model()
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        ours, count = calls(lambda: fused(images))
        expected = model.float()(images.float())
    linears = sum(isinstance(part, nn.Linear) for part in fused.modules())
    assert count == linears > 3 * 4  # four in each block, the patches' and the heads'
    for name in ("features", "summary"):
        error = (ours[name].float() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 0.02  # the weights are rounded to bfloat16 in both
    # what a product gives does not depend on the order of the weight in memory
    linear = fused.encoder.layer[0].mlp.fc1
    rows = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.no_grad():
        close(
            linear(rows).float(),
            nn.functional.linear(rows.float(), linear.weight.float(), linear.bias.float()).bfloat16().float(),
        )


def test_packed_weights_follow_the_weights():
    _, fused = packed_model()
    images = torch.rand(1, 3, 64, 64).bfloat16()
    linear = fused.encoder.layer[0].mlp.fc1
    with torch.no_grad():
        before = fused(images).features
        linear.weight.zero_()
        linear.bias.zero_()
        changed = fused(images).features
        assert not torch.equal(changed, before)
        assert torch.equal(copy.deepcopy(fused)(images).features, changed)  # a copy after a forward pass
        assert torch.equal(pickle.loads(pickle.dumps(fused))(images).features, changed)
        (_, count), single = calls(lambda: fused.float()(images.float())), fused(images.float()).features
    assert count == 0 and single.dtype == torch.float32


def test_packed_weights_stay_out_of_gradients_exports_functions_and_counts():
    _, fused = packed_model()
    images = torch.rand(1, 3, 64, 64).bfloat16()
    with torch.no_grad():
        expected = fused(images).features
    images.requires_grad_()
    output, count = calls(lambda: fused(images).features)
    output.float().sum().backward()
    assert count == 0 and images.grad.abs().sum() > 0
    images = images.detach()
    with torch.no_grad():
        program = torch.export.export(fused, (images,), strict=False)
        assert "mkldnn" not in str(program.graph)
        mapped = torch.func.vmap(lambda image: fused(image, adaptors=[]).to_tuple()[1])(images[None])[0]
        flops = [count_flops(one, images) for one in (fused, vit().bfloat16())]
    assert flops[0] == flops[1] and peak_memory(fused, images) > 0
    for other in (output, program.module()(images).features, mapped):
        torch.testing.assert_close(other, expected, rtol=0.05, atol=0.05)


def test_fuse_leaves_linears_alone_that_gain_nothing():
    model = vit().fuse()
    assert {type(part) for part in model.modules() if isinstance(part, nn.Linear)} == {nn.Linear}
