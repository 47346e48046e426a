import copy
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from transformers_radio import RadioConfig, RadioModel

TINY = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    mlp_ratio=2.0,
    patch_size=16,
    max_img_size=512,
    num_cls_tokens=3,
    num_registers=2,
    summary_idxs=[0, 2],
)


def scramble(model):
    """Weights far from their initialisation (zero biases, unit scales), so that nothing may go missing unseen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def build(**fields):
    torch.manual_seed(0)
    return scramble(RadioModel(RadioConfig(**{**TINY, **fields})).eval())


def native(model):
    """transformers' own class with the weights of `model`."""
    config = transformers.RadioConfig(**{name: getattr(model.config, name) for name in TINY})
    config._attn_implementation = model.config._attn_implementation
    twin = transformers.RadioModel(config).eval().to(model.dtype)
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if key in twin.state_dict()})
    return twin


# ---------------------------------------------------------------- equality with transformers


def test_backbone_weights_have_native_names_and_shapes():
    with torch.device("meta"):
        adaptors = {"a": {"summary_dim": 4, "feature_dim": 4, "hidden_dim": 4}}
        ours = RadioModel(RadioConfig(summary_idxs=[0, 1], adaptors=adaptors))
        theirs = transformers.RadioModel(transformers.RadioConfig())
    shapes = {key: value.shape for key, value in ours.state_dict().items() if not key.startswith("adaptors.a.")}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize(
    ("size", "attention"),
    [
        *(((side, side), "sdpa") for side in (224, 432, 512, 1024)),
        *((size, attention) for size in ((160, 304), (304, 48)) for attention in ("sdpa", "eager")),
    ],
)
def test_outputs_are_bit_equal_to_native(size, attention):
    model = build(attn_implementation=attention)
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        ours, theirs = model(images), native(model)(images)
    assert model.config._attn_implementation == attention
    for name in ("summary", "features", "last_hidden_state"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.summary.shape == (2, 2 * 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_bit_equal_to_native(dtype):
    model = build().to(dtype)
    images = torch.rand(2, 3, 224, 160)
    with torch.no_grad():
        theirs = native(model)(images.to(dtype))
        ours = model(images.to(dtype))
        from_float32 = model(images)
    assert ours.features.dtype == dtype
    assert torch.equal(ours.summary, theirs.summary) and torch.equal(ours.features, theirs.features)
    # float32 pixels are normalised before they are cast, which is at least as exact
    assert (from_float32.features.float() - ours.features.float()).abs().mean() < 0.1


def test_hidden_states_and_attentions_equal_native():
    model = build(attn_implementation="eager")
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        ours = model(images, output_hidden_states=True, output_attentions=True)
        theirs = native(model)(images, output_hidden_states=True, output_attentions=True)
    assert len(ours.hidden_states) == 4 and len(ours.attentions) == 3
    for a, b in zip(ours.hidden_states + ours.attentions, theirs.hidden_states + theirs.attentions, strict=True):
        assert torch.equal(a, b)
    assert model(images).hidden_states is None
    assert len(model(images, output_hidden_states=0).hidden_states) == 4  # an index asks for a layer, 0 too


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_images_equal_native_and_one_by_one(attention):
    model = build(attn_implementation=attention)
    images = [torch.rand(1, 3, 64, 48), torch.rand(1, 3, 32, 96), torch.rand(1, 3, 16, 16)]
    pixels = torch.cat([F.unfold(image, 16, stride=16)[0].T for image in images])
    grids = torch.tensor([[4, 3], [2, 6], [1, 1]])
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with torch.no_grad():
        ours = model(pixels, image_grid_hw=grids, **options)
        theirs = native(model)(pixels, image_grid_hw=grids, **options)
        single = [model(image) for image in images]
        alone = model(pixels[:12], image_grid_hw=grids[:1])
    for name in ("summary", "features", "last_hidden_state"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(a, b)
    if attention == "eager":
        for a, b in zip(ours.attentions, theirs.attentions, strict=True):
            assert torch.equal(a, b)
    torch.testing.assert_close(ours.summary, torch.cat([out.summary for out in single]))
    torch.testing.assert_close(ours.features, torch.cat([out.features[0] for out in single]))
    torch.testing.assert_close(alone.features, single[0].features[0])


# ---------------------------------------------------------------- variants that native does not have


def test_final_norm_mean_summary_and_mlp_norm_against_native_layers():
    model = build(final_norm=True, mlp_norm=True, summary_type="mean", summary_idxs=None)
    twin = native(model)
    images = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        out = model(images, output_hidden_states=True)
        x = twin.embeddings(twin.input_conditioner(images))
        for ours, theirs in zip(model.encoder.layer, twin.encoder.layer, strict=True):
            x = x + theirs.layer_scale1(theirs.attention(theirs.norm1(x))[0])
            y = F.gelu(theirs.mlp.fc1(theirs.norm2(x)))
            y = F.layer_norm(y, (64,), ours.mlp.norm.weight, ours.mlp.norm.bias, eps=1e-6)
            x = x + theirs.layer_scale2(theirs.mlp.fc2(y))
        torch.testing.assert_close(out.hidden_states[-1], x)  # before the final norm
        x = F.layer_norm(x, (32,), model.norm.weight, model.norm.bias, eps=1e-6)
    torch.testing.assert_close(out.last_hidden_state, x)
    torch.testing.assert_close(out.features, x[:, 5:])
    torch.testing.assert_close(out.summary, x[:, 5:].mean(1))


# ---------------------------------------------------------------- cropped position embedding


def bilinear(table, y, x):
    """Value of a (side, side, D) table at continuous position (y, x), corners at 0 and side - 1."""
    y0, x0 = min(int(y), table.shape[0] - 2), min(int(x), table.shape[1] - 2)
    dy, dx = y - y0, x - x0
    top = table[y0, x0] * (1 - dx) + table[y0, x0 + 1] * dx
    bottom = table[y0 + 1, x0] * (1 - dx) + table[y0 + 1, x0 + 1] * dx
    return top * (1 - dy) + bottom * dy


@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (1, 3), (12, 12)])
def test_training_positions_follow_the_formula_image_by_image(rows, cols):
    model = build(max_img_size=128).train()
    side, batch = 8, 4
    torch.manual_seed(3)
    positions = model.embeddings.positions(batch, rows, cols, torch.float32)
    torch.manual_seed(3)
    draws = torch.rand(4, batch, 1)[..., 0].double().numpy()
    table = model.embeddings.position_embedding.detach().double().view(side, side, -1).numpy()
    for image in range(batch):
        s = math.sqrt(0.1) + (1 - math.sqrt(0.1)) * draws[0, image]
        a = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * draws[1, image])
        sx, sy = min(max(s * a, 0), 1), min(max(s / a, 0), 1)
        ox, oy = (1 - sx) * draws[2, image], (1 - sy) * draws[3, image]
        expected = [
            bilinear(
                table, (oy + sy * i / max(rows - 1, 1)) * (side - 1), (ox + sx * j / max(cols - 1, 1)) * (side - 1)
            )
            for i in range(rows)
            for j in range(cols)
        ]
        np.testing.assert_allclose(positions[image].detach().numpy(), np.stack(expected), atol=1e-5)


def test_training_crops_have_the_published_distribution():
    from transformers_radio.modeling.embeddings_radio import cpe_training_grid

    torch.manual_seed(0)
    grid = (cpe_training_grid(20000, 3, 4, [0.1, 1.0]) + 1) / 2
    assert grid.shape == (20000, 3, 4, 2) and grid.min() >= 0 and grid.max() <= 1 + 1e-6
    left, right = grid[:, 0, 0, 0], grid[:, 0, -1, 0]
    top, bottom = grid[:, 0, 0, 1], grid[:, -1, 0, 1]
    width, height = right - left, bottom - top
    free = (width < 0.999) & (height < 0.999)  # nothing was clamped, so the draws can be read back
    side, aspect = (width * height).sqrt()[free], (width / height).sqrt()[free]
    assert side.min() >= math.sqrt(0.1) - 1e-5 and width.max() <= 1 and height.max() <= 1
    assert 3 / 4 - 1e-4 <= aspect.min() < 0.76 and 1.32 < aspect.max() <= 4 / 3 + 1e-4
    # uniform side: the share below the middle of the range where no aspect ratio clamps
    inner = side[side < 0.75]
    assert ((inner < (math.sqrt(0.1) + 0.75) / 2).float().mean() - 0.5).abs() < 0.02
    log_aspect = aspect[side < 0.75].log() / math.log(4 / 3)
    assert log_aspect.mean().abs() < 0.02 and (log_aspect.var() - 1 / 3).abs() < 0.02  # uniform on [-1, 1]
    # uniform offset in what the crop leaves free
    share = (left / (1 - width))[free]
    assert (share.mean() - 0.5).abs() < 0.02 and (share.var() - 1 / 12).abs() < 0.01


def test_scale_range_is_honoured():
    from transformers_radio.modeling.embeddings_radio import cpe_training_grid

    grid = cpe_training_grid(500, 2, 2, [1.0, 1.0])
    assert torch.maximum(grid[:, 0, 1, 0] - grid[:, 0, 0, 0], grid[:, 1, 0, 1] - grid[:, 0, 0, 1]).min() > 1.999


def test_inference_takes_the_top_left_of_a_square_resize():
    model = build()
    table = model.embeddings.position_embedding.detach().view(1, 32, 32, 32).permute(0, 3, 1, 2)
    square = F.interpolate(table, size=(9, 9), mode="bilinear", align_corners=False, antialias=False)
    with torch.no_grad():
        positions = model.embeddings.positions(1, 9, 4, torch.float32)
    assert torch.equal(positions.view(9, 4, 32), square[0].permute(1, 2, 0)[:, :4])


def test_table_is_used_unmodified_on_its_own_grid():
    model = build(max_img_size=128)
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model.embeddings.positions(1, 8, 8, torch.float32), model.embeddings.position_embedding)


def test_position_dropout_leaves_whole_images_without_positions():
    model = build(pos_dropout=0.25).train()
    torch.manual_seed(0)
    positions = model.embeddings.positions(2000, 2, 2, torch.float32)
    dropped = (positions == 0).flatten(1)
    assert (dropped.all(1) == dropped.any(1)).all()
    assert dropped.all(1).float().mean() == pytest.approx(0.25, abs=0.03)
    model.eval()
    assert (model.embeddings.positions(1, 2, 2, torch.float32) != 0).all()


def test_sampling_can_be_switched_off_and_belongs_to_training():
    images = torch.rand(2, 3, 64, 64)
    model = build(cpe_sampling=False).train()
    assert torch.equal(model(images).features, model(images).features)
    model = build().train()
    assert not torch.equal(model(images).features, model(images).features)
    model.eval()
    assert torch.equal(model(images).features, model(images).features)


@torch.no_grad()
def test_cached_positions_notice_every_change_of_the_weights():
    model = build()
    images = torch.rand(1, 3, 64, 96)

    def check():
        fresh = RadioModel(model.config).eval().to(model.dtype)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(model(images).features, fresh(images).features)
        assert torch.equal(model(images).features, fresh(images).features)

    table = model.embeddings.position_embedding
    before = model(images).features
    check()
    assert model.embeddings.positions(1, 4, 6, torch.float32) is model.embeddings.positions(1, 4, 6, torch.float32)
    table.mul_(2)
    assert not torch.equal(model(images).features, before)
    check()
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(images).features.square().sum().backward()
    optimizer.step()
    check()
    model.load_state_dict(build().state_dict())
    assert torch.equal(model(images).features, before)
    model.to(torch.bfloat16)
    check()
    model.float()
    check()
    table.data = torch.randn_like(table)
    check()
    table.data.mul_(3)
    model.eval()
    check()
    table.requires_grad_(False)
    with torch.inference_mode():
        check()
    check()


def test_gradients_reach_the_table_in_eval_mode_too():
    model = build()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        model(images)  # fills the cache
    for _ in range(2):
        model.zero_grad()
        model(images).features.square().sum().backward()
        assert model.embeddings.position_embedding.grad.abs().sum() > 0


# ---------------------------------------------------------------- ViTDet windows


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


# ---------------------------------------------------------------- errors, helpers


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (torch.rand(1, 3, 40, 64), {}, ["40x64", "16", "32x64"]),
        (torch.rand(1, 3, 8, 64), {}, ["8x64", "16x64"]),
        (torch.rand(1, 4, 32, 32), {}, ["(1, 4, 32, 32)", "3"]),
        (torch.rand(3, 32, 32), {}, ["(3, 32, 32)", "batch"]),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), {}, ["uint8", "255"]),
        (torch.rand(1, 3, 64, 96), {"window_size": 3}, ["window_size 3", "4x6", "48x96"]),
        (torch.rand(1, 3, 64, 96), {"window_size": -1}, ["-1"]),
        (torch.rand(1, 3, 64, 96), {"adaptors": ["clip"]}, ["clip"]),
        (torch.rand(1, 3, 64, 96), {"output_attentions": True}, ["sdpa", "eager"]),
        (torch.rand(5, 768), {"image_grid_hw": torch.tensor([[2, 3]])}, ["(5, 768)", "(6, 768)"]),
        (torch.rand(6, 768), {"image_grid_hw": torch.tensor([2, 3])}, ["(2,)"]),
        (torch.rand(6, 768), {"image_grid_hw": torch.tensor([[2, 3]]), "window_size": 2}, ["window_size=0"]),
    ],
)
def test_wrong_input_is_named_with_the_fix(images, options, words):
    with pytest.raises(ValueError) as error:
        build()(images, **options)
    for word in words:
        assert word in str(error.value)


def test_images_in_the_wrong_range_are_reported_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for images, words in ((torch.rand(1, 3, 32, 32) * 255, "255"), (torch.randn(1, 3, 32, 32), "normalized")):
        model = build()
        model(torch.rand(1, 3, 32, 32))
        assert not caplog.records
        model(images)
        model(images)
        assert len(caplog.records) == 1 and words in caplog.text
        assert f"{images.max().item():.2f}" in caplog.text
        caplog.clear()
    model = build()
    conditioner = model.make_preprocessor_external()
    model(conditioner(torch.rand(1, 3, 32, 32)))
    assert not caplog.records


def test_sizes_and_grids():
    model = build(preferred_resolution=64)
    assert (model.patch_size, model.min_resolution_step) == (16, 16)
    assert (model.max_resolution, model.preferred_resolution) == (512, 64)
    assert model.get_nearest_supported_resolution(37, 45) == (32, 48)
    assert model.get_nearest_supported_resolution(1, 1000) == (16, 992)
    features = torch.arange(6.0).view(1, 6, 1)
    assert model.features_to_grid(features, 32, 48)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="6 features.*64x48"):
        model.features_to_grid(features, 64, 48)


def test_images_above_the_table_are_extrapolated_as_native_does():
    model = build(max_img_size=512)
    images = torch.rand(1, 3, 528, 544)
    with torch.no_grad():
        assert torch.equal(model(images).features, native(model)(images).features)


def test_external_preprocessor_gives_the_same_and_saves_a_whole_checkpoint(tmp_path):
    model = build(norm_mean=[0.3, 0.4, 0.5])
    images = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        before = model(images).features
        keys = list(model.state_dict())
        conditioner = model.make_preprocessor_external()
        assert torch.equal(model(conditioner(images)).features, before)
        assert not torch.equal(model(images).features, before)
        with pytest.raises(ValueError, match="already"):
            model.make_preprocessor_external()
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        assert torch.equal(RadioModel.from_pretrained(tmp_path)(images).features, before)


# ---------------------------------------------------------------- training, compiling, meta device


def test_gradient_checkpointing_gives_the_same_gradients():
    images = torch.rand(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        model = build(cpe_sampling=False).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            calls = []
            model.encoder.layer[0].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out = model(images, window_size=2)
        (out.summary.sum() + out.features.square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(calls) == 2  # forward, and again in backward
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)
        assert gradient.abs().sum() > 0, name


def test_initialisation():
    torch.manual_seed(0)
    model = RadioModel(RadioConfig(**{**TINY, "hidden_size": 64, "layerscale_value": 0.5}))
    state = model.state_dict()
    assert state["embeddings.position_embedding"].std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert state["embeddings.cls_register_token"].std().item() == pytest.approx(64**-0.5, rel=0.2)
    assert state["encoder.layer.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert (state["encoder.layer.0.mlp.fc1.bias"] == 0).all() and (state["encoder.layer.0.norm1.weight"] == 1).all()
    assert (state["encoder.layer.2.layer_scale2.lambda1"] == 0.5).all()


def test_model_from_the_meta_device_can_be_filled():
    with torch.device("meta"):
        model = RadioModel(RadioConfig.from_size("vit-h-16"))
        assert model(torch.rand(1, 3, 224, 224)).features.shape == (1, 196, 1280)
        small = RadioModel(RadioConfig(**TINY))
    small.to_empty(device="cpu")
    for module in small.modules():
        module._is_hf_initialized = False
    small.initialize_weights()
    assert small.summary_idxs.tolist() == [0, 2]
    assert small.input_conditioner.norm_mean.flatten().tolist() == pytest.approx(small.config.norm_mean)
    assert small.eval()(torch.rand(1, 3, 32, 32)).features.isfinite().all()


def test_stochastic_depth_keeps_the_expectation_and_is_off_in_eval():
    model = build(drop_path_rate=0.5, cpe_sampling=False)
    drop = model.encoder.layer[0].drop_path
    ones = torch.ones(4000, 1, 1)
    assert torch.equal(drop(ones), ones)
    model.train()
    dropped = drop(ones)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0} and dropped.mean().item() == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training):
    model = build(adaptors={"a": {"summary_dim": 4, "feature_dim": 4, "hidden_dim": 4}}, cpe_sampling=training)
    model.train(training)
    images = torch.rand(2, 3, 64, 96)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.manual_seed(0)
        ours = compiled(images, window_size=2)
        torch.manual_seed(0)
        expected = model(images, window_size=2)
    torch.testing.assert_close(ours.features, expected.features)
    torch.testing.assert_close(ours.adaptors["a"].summary, expected.adaptors["a"].summary)


@pytest.mark.slow
def test_compiles_with_inductor():
    model = build()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        ours = torch.compile(model, fullgraph=True)(images)
        torch.testing.assert_close(ours.features, model(images).features, rtol=1e-4, atol=1e-4)


def test_copies_and_tuples():
    model = build()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        out = model(images)
        assert torch.equal(copy.deepcopy(model)(images).features, out.features)
        as_tuple = model(images, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], out.features)


def test_autocast_and_double_inputs():
    model = build()
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(images).features
        torch.testing.assert_close(model(images.double()).features, expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(images).features
    assert (half.float() - expected).abs().mean() < 0.1
    assert isinstance(model.norm, nn.Identity)
