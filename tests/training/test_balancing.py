"""Each scheme against its formula, and its gradients against derivatives worked out by hand, in numpy float64."""

import math

import numpy as np
import pytest
import torch

from transformers_radio.training.balancing import build_balancing
from transformers_radio.training.losses import Term

WEIGHTS = {"clip/summary": 1.0, "clip/features": 0.5, "dino/summary": 2.0, "dino/features": 1.5, "sam/features": 0.25}
TERMS = {name: Term(*name.split("/"), weight) for name, weight in WEIGHTS.items()}
MODES = ("naive", "uncertainty", "adaloss", "amtml_kd")
BATCH, POSITIONS, SUMMARY, FEATURES = 3, 4, 6, 5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def make(mode, seed=None):
    """The scheme as built, or with random parameters."""
    balancing = build_balancing(mode, list(TERMS.values()), SUMMARY, FEATURES)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in balancing.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return balancing


def call(balancing, losses, summary, features):
    return balancing({TERMS[name]: loss for name, loss in losses.items()}, summary, features)


def update(balancing, means):
    balancing.update(lambda: {TERMS[name]: mean for name, mean in means.items()})


def inputs(names=tuple(WEIGHTS), seed=0):
    generator = torch.Generator().manual_seed(seed)
    terms = {name: torch.rand(BATCH, generator=generator).requires_grad_() for name in names}
    summary = torch.randn(BATCH, SUMMARY, generator=generator).requires_grad_()
    features = torch.randn(BATCH, POSITIONS, FEATURES, generator=generator).requires_grad_()
    return terms, summary, features


def array(tensor):
    return tensor.detach().double().numpy()


def naive(terms):
    return sum(WEIGHTS[name] * array(loss) for name, loss in terms.items())


def close(found, expected):
    np.testing.assert_allclose(array(found), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [tuple(WEIGHTS), ("sam/features",), ("clip/summary", "dino/features")])
def test_every_scheme_starts_at_the_naive_sum_up_to_a_constant(names):
    terms, summary, features = inputs(names)
    constants = {
        "naive": 0.0,
        "uncertainty": sum(WEIGHTS[name] for name in names) * math.log(2),  # softplus(0) a term
        "adaloss": 0.0,
        "amtml_kd": 0.1,  # the penalty on v, whose length is 1
    }
    for mode in MODES:
        total = call(make(mode), terms, summary, features)
        assert total.shape == (BATCH,) and total.dtype == torch.float32
        close(total, naive(terms) + constants[mode])
        gradients = torch.autograd.grad(total.mean(), list(terms.values()))
        for name, gradient in zip(names, gradients, strict=True):
            close(gradient, WEIGHTS[name] / BATCH)


def test_uncertainty_equals_its_formula_and_derivatives():
    balancing = make("uncertainty", seed=1)
    names = ("clip/summary", "clip/features", "sam/features")
    terms, summary, features = inputs(names)
    total = call(balancing, terms, summary, features)
    total.mean().backward()

    pooled = {"summary": array(summary), "features": array(features).mean(1)}
    order = {
        "summary": ["clip/summary", "dino/summary"],
        "features": ["clip/features", "dino/features", "sam/features"],
    }
    expected = np.zeros(BATCH)
    for kind, columns in order.items():
        head = balancing.heads[kind]
        b = pooled[kind] @ array(head.weight).T + array(head.bias)
        slope = np.zeros_like(b)  # d mean(total) / db
        for column, name in enumerate(columns):
            if name not in names:
                continue
            loss = array(terms[name])
            expected += WEIGHTS[name] * (np.exp(-b[:, column]) * loss + np.log1p(np.exp(b[:, column])))
            slope[:, column] = WEIGHTS[name] * (sigmoid(b[:, column]) - np.exp(-b[:, column]) * loss) / BATCH
            close(terms[name].grad, WEIGHTS[name] * np.exp(-b[:, column]) / BATCH)
        close(head.weight.grad, slope.T @ pooled[kind])
        close(head.bias.grad, slope.sum(0))
        into_student = slope @ array(head.weight)
        if kind == "summary":
            close(summary.grad, into_student)
        else:
            close(features.grad, np.repeat(into_student[:, None] / POSITIONS, POSITIONS, axis=1))
    close(total, expected)


def test_amtml_equals_its_formula_and_derivatives():
    balancing = make("amtml_kd", seed=2)
    names = ("clip/summary", "clip/features", "sam/features")  # dino is not served
    terms, summary, features = inputs(names)
    total = call(balancing, terms, summary, features)
    total.mean().backward()

    theta, v = array(balancing.theta)[[0, 2]], array(balancing.v)
    maps = array(features)
    beta = maps.max(1)
    losses = np.stack([naive({name: terms[name] for name in names[:2]}), naive({names[2]: terms[names[2]]})], 1)
    scores = np.exp(np.einsum("bd,td,d->bt", beta, theta, v))
    shares = scores / scores.sum(1, keepdims=True)
    close(total, 2 * (shares * losses).sum(1) + 0.1 * ((v**2).sum() + (theta**2).sum()))

    slope = 2 * shares * (losses - (shares * losses).sum(1, keepdims=True)) / BATCH  # by score
    expected_theta = np.zeros((3, FEATURES))
    expected_theta[[0, 2]] = np.einsum("bt,bd,d->td", slope, beta, v) + 0.2 * theta
    close(balancing.theta.grad, expected_theta)
    close(balancing.v.grad, np.einsum("bt,bd,td->d", slope, beta, theta) + 0.2 * v)
    is_maximum = maps == beta[:, None]
    close(features.grad, is_maximum * np.einsum("bt,td,d->bd", slope, theta, v)[:, None])
    close(terms["clip/features"].grad, 2 * 0.5 * shares[:, 0] / BATCH)


def test_amtml_leaves_its_start_towards_the_easiest_teacher():
    balancing = make("amtml_kd")
    optimizer = torch.optim.Adam(balancing.parameters(), lr=0.01)
    easy, hard = torch.full((BATCH,), 0.1), torch.full((BATCH,), 0.9)
    features = torch.rand(BATCH, POSITIONS, FEATURES)
    for _ in range(50):
        optimizer.zero_grad()
        losses = {"clip/features": hard, "sam/features": easy}
        call(balancing, losses, torch.zeros(BATCH, SUMMARY), features).mean().backward()
        optimizer.step()
    term = hard.clone().requires_grad_()
    total = call(balancing, {"clip/features": term, "sam/features": easy}, torch.zeros(BATCH, SUMMARY), features)
    (gradient,) = torch.autograd.grad(total.sum(), term)
    assert (gradient < 0.9 * WEIGHTS["clip/features"]).all()  # equal shares would give the weight itself


def test_adaloss_divides_by_bias_corrected_averages_of_the_steps_that_had_the_term():
    balancing = make("adaloss")
    rng = np.random.default_rng(0)
    moving, counts = dict.fromkeys(WEIGHTS, 0.0), dict.fromkeys(WEIGHTS, 0)
    terms, summary, features = inputs()
    for step in range(300):
        seen = [name for name in WEIGHTS if not name.startswith("sam") and (name.startswith("clip") or step % 3 == 0)]
        means = {name: float(rng.uniform(0.2, 3)) for name in seen}
        for name, mean in means.items():
            moving[name] = 0.99 * moving[name] + 0.01 * mean
            counts[name] += 1
        update(balancing, {name: torch.tensor(mean) if step % 2 else mean for name, mean in means.items()})
        if step in (0, 1, 10, 299):
            expected = {
                name: WEIGHTS[name] / (moving[name] / (1 - 0.99 ** counts[name])) if counts[name] else WEIGHTS[name]
                for name in WEIGHTS
            }
            total = call(balancing, terms, summary, features)
            close(total, sum(expected[name] * array(terms[name]) for name in WEIGHTS))
            gradients = torch.autograd.grad(total.sum(), list(terms.values()))
            for name, gradient in zip(WEIGHTS, gradients, strict=True):
                close(gradient, expected[name])  # the whole derivative: none passes through the average


def test_adaloss_forward_does_not_move_the_averages_and_a_vanished_term_keeps_a_positive_weight():
    balancing = make("adaloss")
    terms, summary, features = inputs()
    means = {"clip/summary": -1e-8, "clip/features": 0.0, "dino/summary": torch.tensor(0.5, requires_grad=True)}
    update(balancing, means)
    before = {name: value.clone() for name, value in balancing.state_dict().items()}
    for gradient in torch.autograd.grad(call(balancing, terms, summary, features).sum(), list(terms.values())):
        assert (gradient > 0).all() and gradient.isfinite().all()
    assert all(torch.equal(before[name], value) for name, value in balancing.state_dict().items())
    assert not balancing.averages.requires_grad


@pytest.mark.parametrize("names", [("sam/features",), ("clip/summary",), ("clip/summary", "clip/features")])
@pytest.mark.parametrize("mode", ["uncertainty", "amtml_kd"])
def test_parameters_of_absent_terms_get_a_zero_gradient_not_none(mode, names):
    balancing = make(mode, seed=3)
    call(balancing, *inputs(names)).mean().backward()
    assert all(parameter.grad is not None for parameter in balancing.parameters())
    if mode == "amtml_kd":
        absent = {"clip": 0, "dino": 1, "sam": 2}.items() - {(names[0][:4], 0), (names[0][:3], 2)}
        assert all(not balancing.theta.grad[row].any() for _, row in absent)
        return
    for kind, columns in (("summary", ["clip", "dino"]), ("features", ["clip", "dino", "sam"])):
        for column, teacher in enumerate(columns):
            gradient = balancing.heads[kind].weight.grad[column]
            assert bool(gradient.any()) == (f"{teacher}/{kind}" in names)


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_state_gives_the_same_totals(mode, tmp_path):
    balancing = make(mode, seed=4)
    if mode == "adaloss":
        update(balancing, {"clip/summary": 0.3, "sam/features": 2.0})
    torch.save(balancing.state_dict(), tmp_path / "state.pt")
    restored = make(mode)
    restored.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(call(balancing, *inputs()), call(restored, *inputs()))
    assert mode == "naive" or not torch.equal(call(make(mode), *inputs()), call(restored, *inputs()))
    if mode == "adaloss":  # and continues in the same way
        for part in (balancing, restored):
            update(part, {"clip/summary": 0.9})
        assert torch.equal(call(balancing, *inputs()), call(restored, *inputs()))


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_outputs_and_parameters_give_float32_totals(mode):
    terms, summary, features = inputs()
    expected = call(make(mode, seed=5), terms, summary, features)
    found = call(make(mode, seed=5).to(torch.bfloat16), terms, summary.bfloat16(), features.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_unknown_modes_are_refused():
    with pytest.raises(ValueError, match="'gradnorm'.*naive, uncertainty, adaloss, amtml_kd"):
        build_balancing("gradnorm", list(TERMS.values()), SUMMARY, FEATURES)


@pytest.mark.parametrize("mode", ["uncertainty", "adaloss", "amtml_kd"])
def test_terms_that_a_scheme_does_not_know_are_refused(mode):
    _, summary, features = inputs()
    with pytest.raises(KeyError, match="siglip"):
        make(mode)({Term("siglip", "summary", 1.0): torch.ones(BATCH)}, summary, features)
