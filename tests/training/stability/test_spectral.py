import copy
import gc
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from helpers.groups_of_processes import run
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.training.optimizer import build_optimizer
from transformers_radio.training.recipe import OptimizerRecipe, Recipe, StageRecipe
from transformers_radio.training.stability.spectral import (
    add_spectral_reparam,
    fold_spectral,
    has_spectral_reparam,
    power_steps,
)

LINEARS = [
    f"encoder.layer.{layer}.{name}"
    for layer in range(2)
    for name in (*(f"attention.{part}_proj" for part in "qkvo"), "mlp.fc1", "mlp.fc2")
]


def tiny_student(seed=0):
    """Without random parts in training mode, so that two forwards can be compared."""
    torch.manual_seed(seed)
    config = RadioConfig.from_size(
        "vit-ti-16",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=8,
        max_img_size=32,
        initializer_range=0.1,
        cpe_sampling=False,
        pos_dropout=0.0,
        adaptors={"clip": {"summary_dim": 4, "feature_dim": 6, "hidden_dim": 8}},
    )
    return RadioModel(config)


def outputs(model, pixels):
    output = model(pixels)
    head = output.adaptors["clip"]
    return torch.cat([part.flatten() for part in (output.summary, output.features, head.summary, head.features)])


def train_step(model, optimizer, pixels):
    power_steps(model)
    loss = outputs(model, pixels).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def reparams(model):
    return [module for module in model.modules() if type(module).__name__ == "SpectralReparam"]


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_raw_keys_and_which_linears_have_them():
    plain = set(tiny_student().state_dict())
    model = tiny_student()
    assert not has_spectral_reparam(model)
    add_spectral_reparam(model)
    assert has_spectral_reparam(model)
    parts = ("original", "0.scale", "0._u", "0._v", "0._sn_version")
    raw = {f"{name}.parametrizations.weight.{part}" for name in LINEARS for part in parts}
    assert set(model.state_dict()) == plain - {f"{name}.weight" for name in LINEARS} | raw
    with pytest.raises(ValueError, match="already"):
        add_spectral_reparam(model)


def test_the_function_and_the_random_state_stay_as_they_are(pixels):
    model = tiny_student().eval()
    before = outputs(model, pixels)
    random_state = torch.get_rng_state()
    add_spectral_reparam(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(outputs(model, pixels), before, atol=1e-5, rtol=0)


def test_the_largest_singular_value_is_the_scale_once_power_iteration_has_converged():
    model = tiny_student()
    add_spectral_reparam(model)
    with torch.no_grad():
        for index, reparam in enumerate(reparams(model)):
            reparam.scale.fill_(index / 4 - 2)
    for _ in range(300):
        power_steps(model)
    assert len(reparams(model)) == len(LINEARS)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("encoder."):
            rho = module.parametrizations.weight[0].scale.item()
            norm = torch.linalg.matrix_norm(module.weight, ord=2).item()
            assert norm == pytest.approx(math.log1p(math.exp(rho)) + 0.05, rel=1e-4), name


def test_a_power_step_moves_the_vectors_and_a_forward_does_not(pixels):
    model = tiny_student()
    add_spectral_reparam(model)
    linear = model.encoder.layer[0].mlp.fc1
    weight = linear.parametrizations.weight.original.detach().double().numpy()
    reparam = linear.parametrizations.weight[0]
    before = reparam._u.double().numpy().copy()
    model.train()
    model(pixels)
    assert np.array_equal(reparam._u.double().numpy(), before)
    power_steps(model)
    v = weight.T @ before
    v /= np.linalg.norm(v)
    u = weight @ v
    u /= np.linalg.norm(u)
    assert np.abs(u - before).max() > 1e-4
    np.testing.assert_allclose(reparam._u.numpy(), u, atol=1e-6)
    np.testing.assert_allclose(reparam._v.numpy(), v, atol=1e-6)


def test_the_gradient_is_that_of_the_formula_with_constant_vectors():
    model = tiny_student()
    add_spectral_reparam(model)
    linear = model.encoder.layer[1].attention.v_proj
    weights = linear.parametrizations.weight
    upstream = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    (linear.weight * upstream).sum().backward()
    matrix, gradient = weights.original.detach().double().numpy(), upstream.double().numpy()
    u, v = weights[0]._u.double().numpy(), weights[0]._v.double().numpy()
    sigma, rho = u @ matrix @ v + 1e-6, weights[0].scale.item()
    scale = math.log1p(math.exp(rho)) + 0.05
    expected = scale / sigma * gradient - scale / sigma**2 * (gradient * matrix).sum() * np.outer(u, v)
    np.testing.assert_allclose(weights.original.grad.numpy(), expected, rtol=1e-4, atol=1e-4)
    expected = (gradient * matrix).sum() / sigma / (1 + math.exp(-rho))  # softplus' = sigmoid
    assert weights[0].scale.grad.item() == pytest.approx(expected, rel=1e-4)


def test_weight_decay_applies_to_scale_and_matrix():
    model = tiny_student()
    add_spectral_reparam(model)
    recipe = Recipe(optimizer=OptimizerRecipe(weight_decay=0.02))
    trained = torch.nn.ModuleDict({"student": model})
    groups = build_optimizer(trained, recipe, StageRecipe(steps=1, resolution=32)).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] == 0.02 for parameter in group["params"]}
    for name in LINEARS:
        weights = model.get_submodule(name).parametrizations.weight
        assert {id(weights.original), id(weights[0].scale)} <= decayed


def test_folded_weights_after_training_load_strictly_and_compute_the_same(pixels, tmp_path):
    model = tiny_student()
    add_spectral_reparam(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    start = model.state_dict()["encoder.layer.0.mlp.fc1.parametrizations.weight.0.scale"].clone()
    losses = [train_step(model, optimizer, pixels) for _ in range(4)]
    assert losses[-1] < losses[0]
    model.eval()
    expected = outputs(model, pixels)
    raw = model.state_dict()
    assert (raw["encoder.layer.0.mlp.fc1.parametrizations.weight.0.scale"] - start).abs() > 1e-3
    folded = fold_spectral(raw)
    plain = tiny_student(seed=9).eval()
    plain.load_state_dict(folded, strict=True)
    torch.testing.assert_close(outputs(plain, pixels), expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path, state_dict=folded)
    loaded, info = RadioModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(outputs(loaded.eval(), pixels), expected, atol=1e-5, rtol=0)


def test_a_folded_average_has_the_averaged_scale_as_its_spectral_norm():
    """u and v belong to the last weights: for their average, u^T W v is far from the largest singular value."""
    model = tiny_student()
    add_spectral_reparam(model)
    generator = torch.Generator().manual_seed(4)
    averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith("weight.original"):  # the weights have gone elsewhere, and u and v with them
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        elif name.endswith("0.scale"):
            averages[name] += torch.rand(1, 1, generator=generator)
    power_steps(model)
    folded = fold_spectral({**model.state_dict(), **averages}, averaged=True)
    off = []
    for name in LINEARS:
        prefix = f"{name}.parametrizations.weight."
        weight, rho = averages[f"{prefix}original"].double().numpy(), averages[f"{prefix}0.scale"].item()
        singular_values = np.linalg.svd(folded[f"{name}.weight"].double().numpy(), compute_uv=False)
        scale = math.log1p(math.exp(rho)) + 0.05
        assert singular_values[0] == pytest.approx(scale, rel=1e-5), name
        # the average itself, and nothing but its length, has changed
        np.testing.assert_allclose(
            folded[f"{name}.weight"], weight * scale / np.linalg.svd(weight, compute_uv=False)[0], rtol=1e-4, atol=1e-6
        )
        trained = fold_spectral({**model.state_dict(), **averages})[f"{name}.weight"]
        off.append(np.linalg.norm(trained.double().numpy(), ord=2) / scale)
    assert max(off) > 1.5  # what the test is about


@pytest.mark.parametrize("version", [None, 1, 2])
def test_both_versions_of_a_file_are_folded_and_loaded(version):
    rng = np.random.default_rng(0)
    weight, u, v, rho = rng.normal(size=(64, 32)), rng.normal(size=64), rng.normal(size=32), 1.7
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    scale = np.log1p(np.exp(rho)) + 0.05 if version == 2 else rho
    expected = weight * scale / (u @ weight @ v + 1e-6)
    prefix = "encoder.layer.0.mlp.fc1.parametrizations.weight."
    model = tiny_student()
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "encoder.layer.0.mlp.fc1.weight"}
    state |= {f"{prefix}{key}": torch.tensor(value).float() for key, value in {"original": weight, "0._u": u}.items()}
    state |= {f"{prefix}0._v": torch.tensor(v).float(), f"{prefix}0.scale": torch.full((1, 1), rho)}
    if version is not None:
        state[f"{prefix}0._sn_version"] = torch.tensor(version)
    given = dict(state)
    folded = fold_spectral(state)
    assert state == given  # the caller's dict is as it was
    np.testing.assert_allclose(folded["encoder.layer.0.mlp.fc1.weight"], expected, rtol=1e-3, atol=1e-4)
    assert all(folded[key] is tensor for key, tensor in state.items() if "parametrizations" not in key)

    add_spectral_reparam(model)
    raw = {**model.state_dict(), **{key: tensor for key, tensor in state.items() if key.startswith(prefix)}}
    if version is None:
        del raw[f"{prefix}0._sn_version"]
    model.load_state_dict(raw, strict=True)
    np.testing.assert_allclose(model.encoder.layer[0].mlp.fc1.weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_keys_that_cannot_be_folded_are_errors():
    model = tiny_student()
    add_spectral_reparam(model)
    state = model.state_dict()
    prefix = "encoder.layer.0.mlp.fc1.parametrizations.weight."
    with pytest.raises(ValueError, match=r"fc1.*lacks 0\._v"):
        fold_spectral({key: tensor for key, tensor in state.items() if key != f"{prefix}0._v"})
    with pytest.raises(ValueError, match=r"0\.parts\.0\.scale is not part"):
        fold_spectral({**state, f"{prefix}0.parts.0.scale": torch.ones(1, 1)})


def test_a_weight_too_small_is_named_and_nothing_has_changed():
    model = tiny_student()
    keys = list(model.state_dict())
    with torch.no_grad():
        model.encoder.layer[1].mlp.fc2.weight.mul_(1e-3)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.mlp\.fc2\.weight: the largest singular value is"):
        add_spectral_reparam(model)
    assert list(model.state_dict()) == keys


def test_gradient_checkpointing_gives_the_same_gradients_and_vectors(pixels):
    gradients, vectors = [], []
    for checkpointing in (False, True):
        model = tiny_student()
        add_spectral_reparam(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for _ in range(2):  # gradients of two passes, as with accumulation
            outputs(model, pixels).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        vectors.append([reparam._u.clone() for reparam in reparams(model)])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(torch.equal(*pair) for pair in zip(*vectors, strict=True))


def test_two_forwards_may_come_before_their_backward(pixels):
    model = tiny_student()
    add_spectral_reparam(model)
    (outputs(model, pixels).square().mean() + outputs(model, pixels[:1]).square().mean()).backward()


def test_half_precision_autocast_leaves_vectors_and_weights_in_float32(pixels):
    models = [tiny_student(), tiny_student()]
    for model, autocast in zip(models, (False, True), strict=True):
        add_spectral_reparam(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            power_steps(model)
            model(pixels)
            assert model.encoder.layer[0].mlp.fc1.weight.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True))


def test_a_deepcopy_is_independent(pixels):
    model = tiny_student()
    add_spectral_reparam(model)
    duplicate = copy.deepcopy(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    train_step(duplicate, torch.optim.AdamW(duplicate.parameters(), lr=1e-2), pixels)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    moved = {key for key, tensor in duplicate.state_dict().items() if not torch.equal(tensor, state[key])}
    for name in LINEARS:
        assert {f"{name}.parametrizations.weight.{part}" for part in ("original", "0.scale", "0._u", "0._v")} <= moved


def sharded_training():
    """Two processes, half of the batch each, against one plain model with the whole batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plain, sharded = tiny_student(), tiny_student()
    for model in (plain, sharded):
        add_spectral_reparam(model)
        model.gradient_checkpointing_enable()
    for layer in sharded.encoder.layer:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy())
    fully_shard(sharded)
    assert isinstance(sharded.encoder.layer[0].mlp.fc1.parametrizations.weight.original, DTensor)
    # not Adam, which turns the rounding errors of a gradient that is zero (key biases) into whole steps
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1) for model in (plain, sharded)]
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        losses = []
        for model, optimizer in zip((plain, sharded), optimizers, strict=True):
            batch = pixels if model is plain else pixels[2 * rank : 2 * rank + 2]
            losses.append(torch.tensor(train_step(model, optimizer, batch)))
        dist.all_reduce(losses[1])
        torch.testing.assert_close(losses[1] / 2, losses[0], rtol=1e-4, atol=1e-6)
    expected = plain.state_dict()
    for key, tensor in sharded.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.allclose(whole, expected[key], rtol=1e-4, atol=1e-5), (key, (whole - expected[key]).abs().max())


def in_group():
    sharded_training()
    gc.collect()  # sharded models hold on to the group, whose threads would outlive the interpreter: an abort
    dist.destroy_process_group()


def test_sharded_over_two_processes_it_trains_as_in_one():
    run(2, target=in_group)
