"""FLOPs and memory of a forward pass against closed forms."""

import pytest
import torch
from torch import nn

from transformers_radio.evaluation.speed.cost import AliveTensors, count_flops, module_tensors, peak_memory
from transformers_radio.modeling import RadioConfig, RadioModel


def student(attention="sdpa", depth=3, width=32, heads=2, **fields):
    tiny = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "mlp_ratio": 2.0}
    config = RadioConfig(**tiny, patch_size=8, max_img_size=64, num_cls_tokens=2, num_registers=1, **fields)
    config._attn_implementation = attention
    return RadioModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_of_a_vision_transformer(attention):
    batch, depth, width, hidden, patches = 2, 3, 32, 64, 4 * 6
    tokens = patches + 3
    linear = 4 * tokens * width**2 + 2 * tokens * width * hidden  # q, k, v, output; two layers of the MLP
    products = 2 * tokens**2 * width  # queries by keys, weights by values, over all heads
    multiply_adds = patches * (3 * 8 * 8) * width + depth * (linear + products)
    assert count_flops(student(attention), torch.rand(batch, 3, 32, 48)) == 2 * batch * multiply_adds


def test_flops_of_a_convolution_and_nothing_else():
    layers = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.GELU()).eval()
    assert count_flops(layers, torch.rand(2, 3, 8, 8)) == 2 * 2 * (6 * 6 * 5 * 3 * 3 * 3)


def test_peak_of_a_chain_is_its_largest_neighbors():
    # (B, 8) -> 32 -> 128 -> 4: at the widest, the input and the output of a layer are alive
    batch, layers = 16, nn.Sequential(*(nn.Linear(a, b) for a, b in [(8, 32), (32, 128), (128, 4)]))
    images = torch.rand(batch, 8)
    weights = (8 * 32 + 32) + (32 * 128 + 128) + (128 * 4 + 4)
    expected = 4 * (weights + batch * 8 + batch * (32 + 128))
    assert peak_memory(layers, images, module_tensors(layers)) == expected
    # what the caller keeps counts on: all three outputs
    kept = []

    def keep(images):
        for layer in layers:
            images = layer(images)
            kept.append(images)

    assert peak_memory(keep, images) == 4 * batch * (8 + 32 + 128 + 4)


def test_views_and_changes_in_place_take_no_memory_and_freed_memory_does_not_count():
    images = torch.rand(10, 4)

    def forward(images):
        images.view(20, 2).mul_(1)  # the input's own memory
        doubled = images * 2  # 160 bytes
        doubled.T.add_(1)
        del doubled
        return images + 1, images.new_empty(10)  # 160 and 40

    assert peak_memory(forward, images) == 160 + 200
    with AliveTensors() as alive:
        outputs = forward(images)
        assert alive.alive == 200
        del outputs
        assert alive.alive == 0 and alive.peak == 200


def test_weights_that_share_memory_count_once_and_named_ones_can_be_left_out():
    adaptor = {"summary_dim": 8, "feature_dim": 8, "hidden_dim": 8, "teacher": ""}
    with_head, without = student(adaptors={"clip": adaptor}), student(summary_idxs=[0])
    backbone = module_tensors(with_head, "adaptors.")
    assert sum(tensor.numel() for tensor in backbone) == sum(tensor.numel() for tensor in module_tensors(without))
    images = torch.rand(1, 3, 32, 32)
    twice = peak_memory(lambda images: None, images, backbone + backbone)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in without.buffers())
    assert twice == 4 * sum(parameter.numel() for parameter in without.parameters()) + buffers + 4 * images.numel()


def test_memory_grows_with_the_batch_by_the_same_step():
    model = student()
    model(torch.rand(1, 3, 32, 32), adaptors=[])  # fills the cache of resized positions
    peaks = [
        peak_memory(lambda images: model(images, adaptors=[]).features, torch.rand(batch, 3, 32, 32))
        for batch in (1, 2, 3)
    ]
    assert peaks[1] - peaks[0] == peaks[2] - peaks[1] > 4 * 19 * 64  # at least the hidden layer of an MLP


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_peak_leaves_other_models_out():
    other = torch.zeros(2**20, device="cuda")
    layers = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 256)).cuda()
    images = torch.rand(64, 256, device="cuda")
    layers(images)
    peak = peak_memory(layers, images)
    assert 4 * 64 * (256 + 1024 + 256) <= peak < 4 * other.numel()
