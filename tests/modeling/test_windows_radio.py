"""ViTDet windows against a slow loop, and how a window is chosen."""

import pytest
import torch

from helpers.tiny_radio import build, native


@torch.no_grad()
def slow_windows(model, images, size, global_blocks, average):
    """Windows with native layers, one window at a time, tokens looked up by their coordinates."""
    twin = native(model)
    x = twin.embeddings(twin.input_conditioner(images))
    rows, cols = images.shape[2] // 16, images.shape[3] // 16
    prefix, patches = x[:, :5].clone(), x[:, 5:].clone()
    windows = [(top, left) for top in range(0, rows, size) for left in range(0, cols, size)]
    copies = None
    for index, layer in enumerate(twin.encoder.layer):
        if index in global_blocks:
            if copies is not None:
                prefix, copies = torch.stack(list(copies.values())).mean(0), None
            x = layer(torch.cat([prefix, patches], 1))
            prefix, patches = x[:, :5], x[:, 5:].clone()
            continue
        if average and copies is None:
            copies = {window: prefix for window in windows}
        for top, left in windows:
            inside = [(top + i) * cols + left + j for i in range(size) for j in range(size)]
            tokens = patches[:, inside]
            if average:
                tokens = torch.cat([copies[top, left], tokens], 1)
            tokens = layer(tokens)
            if average:
                copies[top, left], tokens = tokens[:, :5], tokens[:, 5:]
            patches[:, inside] = tokens
    return torch.cat([prefix, patches], 1)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("size", "height", "width"), [(2, 64, 96), (3, 48, 144), (4, 64, 64), (1, 32, 48)])
def test_windows_equal_a_slow_loop(size, height, width, average):
    model = build(num_hidden_layers=6, window_num_global=2, window_prefix="average" if average else "bypass")
    images = torch.rand(2, 3, height, width)
    expected = slow_windows(model, images, size, {2, 5}, average)
    with torch.no_grad():
        out = model(images, window_size=size, output_hidden_states=True)
        full = model(images)
    torch.testing.assert_close(out.last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.hidden_states[-1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.summary, expected[:, [0, 2]].flatten(1), rtol=1e-4, atol=1e-4)
    one_window = (height, width) == (size * 16, size * 16)
    assert ((out.features - full.features).abs().max() < 1e-4) == (one_window and average)


def test_hidden_states_and_attentions_of_windowed_runs_are_in_image_order():
    model = build(num_hidden_layers=4, window_num_global=2, attn_implementation="eager")
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        out = model(images, window_size=2, output_hidden_states=True, output_attentions=True)
        # block 1 is global: recompute it from the hidden state before it, which is in image order
        hidden, attention = model.encoder.layer[1](out.hidden_states[1])
    torch.testing.assert_close(out.hidden_states[2], hidden)
    torch.testing.assert_close(out.attentions[1], attention)
    assert out.attentions[0].shape == (2 * 6, 2, 4, 4)
    with torch.no_grad():  # the first window of the first block, by hand; CLS and registers skip it
        inside = [5 + row * 6 + col for row in range(2) for col in range(2)]
        window, _ = model.encoder.layer[0](out.hidden_states[0][:, inside])
    torch.testing.assert_close(out.hidden_states[1][:, inside], window)
    assert torch.equal(out.hidden_states[1][:, :5], out.hidden_states[0][:, :5])


def test_default_window_and_how_to_leave_it():
    model = build(window_size=2)
    images = torch.rand(1, 3, 64, 64)
    plain = build()
    with torch.no_grad():
        assert torch.equal(model(images).features, plain(images, window_size=2).features)
        assert torch.equal(model(images, window_size=0).features, plain(images).features)
    assert model.min_resolution_step == 32 and plain.min_resolution_step == 16
    with pytest.raises(ValueError, match="window_size 2 does not divide the 3x5.*64x64"):
        model(torch.rand(1, 3, 48, 80))


def test_training_draws_windows_that_divide_the_grid():
    model = build(train_window_sizes=[2, 3, 4, 6, 12], train_window_probability=0.75)
    generator = torch.Generator().manual_seed(0)
    drawn = [model.sample_window_size(12 * 16, 12 * 16, generator) for _ in range(4000)]
    counts = {size: drawn.count(size) / 4000 for size in set(drawn)}
    assert counts.pop(0) == pytest.approx(0.25, abs=0.03)
    assert counts.keys() == {2, 3, 4, 6}  # 12 is the whole grid
    assert all(share == pytest.approx(0.75 / 4, abs=0.03) for share in counts.values())
    assert {model.sample_window_size(12 * 16, 8 * 16, generator) for _ in range(200)} == {0, 2, 4}
    assert {model.sample_window_size(5 * 16, 7 * 16, generator) for _ in range(50)} == {0}
    # equally seeded generators agree, as ranks must
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    assert [model.sample_window_size(192, 192, first) for _ in range(20)] == [
        model.sample_window_size(192, 192, second) for _ in range(20)
    ]


def test_forward_uses_the_drawn_window_in_training_only():
    model = build(train_window_sizes=[2], train_window_probability=1.0, cpe_sampling=False)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        windowed, full = model(images, window_size=2).features, model(images).features
        model.train()
        assert torch.equal(model(images).features, windowed)
        assert torch.equal(model(images, window_size=0).features, full)
