import copy

import pytest
import torch

from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.training.stability.spectral import add_spectral_reparam
from transformers_radio.training.stability.weight_noise import add_weight_noise

STD = 0.2


def student():
    torch.manual_seed(0)
    config = RadioConfig.from_size(
        "vit-ti-16",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=8,
        max_img_size=64,
        initializer_range=0.1,
        pos_dropout=0.1,
        drop_path_rate=0.1,
        adaptors={"clip": {"summary_dim": 4, "feature_dim": 6, "hidden_dim": 8}},
    )
    return RadioModel(config)


def effective_weight(linear):
    # a Linear maps the unit vectors to the columns of its weight: (in, in) -> (in, out) -> (out, in)
    with torch.no_grad():
        return (linear(torch.eye(linear.in_features, dtype=linear.weight.dtype)) - linear.bias).T


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_mean_and_spread_over_many_forwards():
    model = student().train()
    add_weight_noise(model, STD)
    linear = model.encoder.layer[1].mlp.fc1
    draws = torch.stack([effective_weight(linear) for _ in range(500)]).double()  # (500, 64, 32)
    weight = linear.weight.detach().double()
    noise = (draws / weight - 1) / STD
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert noise.mean(0).abs().max() < 5.5 / 500**0.5  # of every entry by itself
    assert (noise.std(0) - 1).abs().max() < 5.5 / 1000**0.5
    assert (noise**4).mean() == pytest.approx(3, abs=0.05)  # a normal distribution's
    # independent over forwards, rows and columns
    for axis in range(3):
        first, second = noise.narrow(axis, 0, noise.shape[axis] - 1), noise.narrow(axis, 1, noise.shape[axis] - 1)
        assert (first * second).mean().abs() < 5 / first.numel() ** 0.5


def test_only_linears_of_the_encoder_have_noise_and_only_while_training(pixels):
    plain, model = student(), student()
    add_weight_noise(model, STD)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, module in model.train().named_modules():
        if isinstance(module, torch.nn.Linear):
            x = torch.ones(1, module.in_features)
            assert torch.equal(module(x), module(x)) != name.startswith("encoder."), name
    noisy, quiet = model.eval()(pixels), plain.eval()(pixels)
    assert torch.equal(noisy.summary, quiet.summary) and torch.equal(noisy.features, quiet.features)


def test_gradient_is_that_of_the_effective_weight_times_one_plus_noise():
    model = student().train()
    add_weight_noise(model, STD)
    linear = model.encoder.layer[0].attention.q_proj
    generator = torch.Generator().manual_seed(3)
    x, upstream = torch.randn(5, 32, generator=generator), torch.randn(5, 32, generator=generator)
    torch.manual_seed(7)
    y = linear(x)
    y.backward(upstream)
    torch.manual_seed(7)
    factor = 1 + STD * torch.randn(32, 32)
    torch.testing.assert_close(y, x @ (linear.weight * factor).T + linear.bias)
    torch.testing.assert_close(linear.weight.grad, upstream.T @ x * factor)


@pytest.mark.parametrize("spectral", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(pixels, spectral):
    gradients = []
    for checkpointing in (False, True):
        model = student().train()
        if spectral:
            add_spectral_reparam(model)
        add_weight_noise(model, STD)
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        for _ in range(2):
            output = model(pixels)
            (output.adaptors["clip"].features.square().mean() + output.summary.square().mean()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 30
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_restored_generator_gives_the_same_noise(pixels):
    model = student().train()
    add_weight_noise(model, STD)
    state = torch.get_rng_state()
    first, second = model(pixels).features, model(pixels).features
    torch.set_rng_state(state)
    assert torch.equal(model(pixels).features, first) and torch.equal(model(pixels).features, second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("noise_first", [False, True])
def test_noise_comes_after_the_spectral_reparametrisation(noise_first):
    model = student().train()
    if noise_first:
        add_weight_noise(model, STD)
    add_spectral_reparam(model)
    if not noise_first:
        add_weight_noise(model, STD)
    linear = model.encoder.layer[0].mlp.fc2
    with torch.no_grad():
        linear.parametrizations.weight[0].scale.fill_(2.0)  # W' is not W
    torch.manual_seed(7)
    found = effective_weight(linear)
    torch.manual_seed(7)
    torch.testing.assert_close(found, linear.weight * (1 + STD * torch.randn(32, 64)))
    assert not torch.allclose(linear.weight, linear.parametrizations.weight.original, rtol=0.1)


def test_a_deepcopy_uses_its_own_weights():
    model = student()
    add_weight_noise(model, STD)
    linear = copy.deepcopy(model).encoder.layer[0].mlp.fc1
    with torch.no_grad():
        linear.weight.zero_()
    assert effective_weight(linear).abs().max() == 0
    assert effective_weight(model.encoder.layer[0].mlp.fc1).abs().max() > 0


def test_half_precision_weights_stay_in_half_precision():
    model = student().train().to(torch.bfloat16)
    add_weight_noise(model, STD)
    linear = model.encoder.layer[0].mlp.fc1
    assert linear(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("std", [0, -0.1, 1.5, float("nan")])
def test_a_wrong_standard_deviation_is_named(std):
    with pytest.raises(ValueError, match=f"weight noise is {std}; expected"):
        add_weight_noise(student(), std)
