import copy
import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import transformers_radio.modeling.modeling_radio as modeling_radio
from helpers.tiny_radio import TINY, build, native
from transformers_radio import RadioConfig, RadioForImageClassification, RadioModel

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
def test_half_precision_is_bit_equal_to_native_with_exact_mean_and_std(dtype):
    model = build().to(dtype)
    images = torch.rand(2, 3, 224, 160)
    with torch.no_grad():
        theirs = native(model)(images.to(dtype))
        ours = model(images.to(dtype))
        from_float32 = model(images)
    assert ours.features.dtype == dtype
    assert torch.equal(ours.summary, theirs.summary) and torch.equal(ours.features, theirs.features)
    # float32 pixels are normalized before they are cast, which is at least as exact
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
    assert len(model(images, output_hidden_states=0).hidden_states) == 4  # an index asks for a layer; so does 0


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


@pytest.mark.parametrize("window_size", [0, 2])
def test_attentions_are_computed_under_sdpa_as_under_eager(window_size, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    modeling_radio.logger.warning_once.cache_clear()
    images = torch.rand(2, 3, 64, 96)
    options = {"window_size": window_size, "output_attentions": True}
    with torch.no_grad():
        expected = build(attn_implementation="eager")(images, **options)
        assert not caplog.records
        model = build(attn_implementation="sdpa")
        for _ in range(2):
            found = model(images, **options)
        plain = model(images, window_size=window_size)
    assert len(caplog.records) == 1 and "sdpa" in caplog.text and "eager" in caplog.text
    assert plain.attentions is None and model.config._attn_implementation == "sdpa"
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found.features, expected.features)


def test_packed_images_reach_flash_attention_in_one_call_with_their_ends(monkeypatch):
    calls = []

    def packed_flash(module, query, key, value, attention_mask, scaling, dropout, **options):
        """What flash attention does with packed sequences, by PyTorch's attention for each image."""
        calls.append((query.shape, attention_mask, dropout, options))
        ends = options["cu_seq_lens_q"].tolist()
        outputs = [
            F.scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scale=scaling
            )
            for start, end in pairwise(ends)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2), None  # (1, L, heads, D/heads), as transformers' functions

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "packed_flash", packed_flash)
    model = build(attn_implementation="sdpa")
    pixels, grids = torch.rand(12 + 12 + 1, 768), torch.tensor([[4, 3], [2, 6], [1, 1]])
    with torch.no_grad():
        expected = model(pixels, image_grid_hw=grids)
        model.config._attn_implementation = "packed_flash"
        found = model(pixels, image_grid_hw=grids)
    for name in ("summary", "features"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert len(calls) == model.config.num_hidden_layers
    for shape, mask, dropout, options in calls:
        assert shape == (1, 2, 17 + 17 + 6, 16) and mask is None and dropout == 0.0  # 5 tokens before the patches
        assert set(options) == {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        assert options["max_length_q"] == options["max_length_k"] == 17
        for ends in (options["cu_seq_lens_q"], options["cu_seq_lens_k"]):
            assert ends.dtype == torch.int32 and ends.tolist() == [0, 17, 34, 40]


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
        (torch.rand(1, 3, 64, 96), {"window_size": 2.0}, ["2.0", "whole number"]),
        (torch.rand(0, 3, 64, 96), {}, ["no image"]),
        (np.zeros((1, 3, 32, 32), np.float32), {}, ["ndarray", "torch.as_tensor"]),
        (torch.rand(6, 768), {"image_grid_hw": [[2, 3]]}, ["list", "torch.as_tensor"]),
        (torch.rand(0, 768), {"image_grid_hw": torch.zeros(0, 2, dtype=torch.long)}, ["no image"]),
        (torch.rand(1, 3, 64, 96), {"adaptors": ["clip"]}, ["clip"]),
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
    hole = torch.rand(1, 3, 32, 32)
    hole[0, 0, 0, 0] = torch.nan
    for images, words in (
        (torch.rand(1, 3, 32, 32) * 255, "255"),
        (torch.randn(1, 3, 32, 32), "normalized"),
        (hole, "NaN"),
    ):
        model = build()
        model(torch.rand(1, 3, 32, 32))
        assert not caplog.records
        model(images)
        model(images)
        assert len(caplog.records) == 1 and words in caplog.text
        assert ("normalized" in caplog.text) == (words == "normalized")
        assert images is hole or f"{images.max().item():.2f}" in caplog.text
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


@pytest.mark.parametrize("external", [False, True])
def test_casts_leave_mean_and_std_exact(tmp_path, external):
    mean = [0.48145466, 0.4578275, 0.40821073]  # half precision cannot hold these

    def statistics(model):
        return {name: buffer for name, buffer in model.state_dict().items() if "conditioner" in name}

    exact = statistics(build(norm_mean=mean))
    assert exact["input_conditioner.norm_mean"].flatten().tolist() == torch.tensor(mean).tolist()
    model = build(norm_mean=mean)
    if external:
        conditioner = model.make_preprocessor_external().bfloat16()
        torch.testing.assert_close(
            conditioner(torch.ones(1, 3, 1, 1))[0], (1 - exact["input_conditioner.norm_mean"]) / conditioner.norm_std
        )
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    config = RadioConfig(**TINY, norm_mean=mean)
    for cast in (
        model,
        model.half(),
        model.double(),
        RadioModel.from_pretrained(tmp_path),
        RadioModel.from_pretrained(tmp_path, dtype=torch.float16),
        RadioModel._from_config(config, dtype=torch.bfloat16),
        RadioForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16),
    ):
        for name, statistic in statistics(cast).items():
            assert statistic.dtype == torch.float32 and torch.equal(statistic, exact[name.removeprefix("model.")]), (
                name
            )
    assert RadioModel.from_pretrained(tmp_path).dtype == torch.bfloat16


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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("reentrant", "hook"), [(True, True), (True, False), (False, True), (False, False)])
def test_gradient_checkpointing_reaches_weights_above_frozen_embeddings(reentrant, hook, packed):
    def gradients(checkpointing):
        model = build(cpe_sampling=False).train()
        for name, weight in model.named_parameters():
            weight.requires_grad_("layer.0.mlp.fc1" in name or "layer.2.attention.q_proj" in name)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            if hook:
                model.enable_input_require_grads()
        if packed:
            out = model(pixels, image_grid_hw=torch.tensor([[2, 2], [1, 2]]))
        else:
            out = model(images)
        out.summary.square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}

    images, pixels = torch.rand(2, 3, 32, 64), torch.rand(6, 768)
    expected, found = gradients(False), gradients(True)
    assert len(expected) == 4
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_initialization():
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
