"""Attention from the summary tokens against the softmax written out by hand, and the figure by its pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.visualization.attention import attention_figure, summary_attention

GRID = (4, 6)


def student(**options):
    torch.manual_seed(0)
    config = RadioConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        patch_size=4,
        max_img_size=32,
        num_cls_tokens=2,
        num_registers=3,
        initializer_range=0.3,
        window_num_global=2,
        attn_implementation="sdpa",
        **options,
    )
    return RadioModel(config).eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def by_hand(model, images, layer):
    """softmax(q k / sqrt(d)) in numpy, from the tokens that enter the block: (B, 2, heads, h, w)."""
    with torch.no_grad():
        tokens = model(images, adaptors=[], output_hidden_states=True).hidden_states[layer]
        block = model.encoder.layer[layer]
        normed = block.norm1(tokens).double().numpy()
    weights = {n: p.detach().double().numpy() for n, p in block.attention.named_parameters()}
    query, key = (normed @ weights[f"{n}_proj.weight"].T + weights[f"{n}_proj.bias"] for n in ("q", "k"))
    maps = np.empty((2, 2, 3, *GRID))
    for image in range(2):
        for head in range(3):
            q, k = (x[image, :, 8 * head : 8 * head + 8] for x in (query, key))
            scores = np.exp(q @ k.T / np.sqrt(8))
            probabilities = scores / scores.sum(axis=1, keepdims=True)
            for token in range(2):
                maps[image, token, head] = probabilities[token, 5:].reshape(GRID)  # behind 2 class and 3 registers
    return maps


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_equals_the_softmax_by_hand_and_leaves_the_model_as_it_was(images, layer):
    model = student()
    before = model(images, adaptors=[]).features
    maps = summary_attention(model, images, layer)
    assert maps.shape == (2, 2, 3, *GRID) and maps.dtype == torch.float32
    np.testing.assert_allclose(maps, by_hand(model, images, layer % 4), atol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(before, model(images, adaptors=[]).features)


def test_with_windows_only_blocks_with_global_attention_are_shown_and_in_the_image_s_order(images):
    model = student(window_size=2)
    assert model.config.global_blocks == [1, 3]
    np.testing.assert_allclose(summary_attention(model, images, 1), by_hand(model, images, 1), atol=1e-6)
    with pytest.raises(ValueError, match=r"Block 2 attends within windows of 2 .*layer among \[1, 3\]"):
        summary_attention(model, images, -2)
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_shown_is_refused(images):
    with pytest.raises(ValueError, match="layer is 4; expected -4 to 3"):
        summary_attention(student(), images, 4)
    with pytest.raises(ValueError, match="summary is the mean of its features"):
        summary_attention(student(summary_type="mean"), images)


def test_figure_is_bright_where_the_attention_is(tmp_path):
    attention = torch.full((1, 2, 4, 4), 0.01)
    attention[0, 0, 0, 0] = attention[0, 1, 3, 3] = 0.5
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    path = attention_figure(image, attention, tmp_path / "a.png", ["left", "right"], "block 1")
    pixels = np.asarray(Image.open(path).convert("L")).astype(int)  # 160 dpi: panels of 256, from 112 down
    first, second = pixels[113:367, 286:538], pixels[113:367, 551:803]
    assert first[:48, :48].mean() > 5 * first[128:, 128:].mean()
    assert second[-48:, -48:].mean() > 5 * second[:128, :128].mean()
