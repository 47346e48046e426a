"""Equations 1 to 3 against values worked out by hand, numpy and torchvision."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F2

from transformers_radio.training.losses import common_grid, cosine_loss, match_loss, resize_grid


@pytest.mark.parametrize(("degrees", "expected"), [(0, 0.0), (60, 0.5), (90, 1.0), (180, 2.0)])
def test_cosine_loss_is_one_minus_cosine_whatever_the_lengths(degrees, expected):
    angle = math.radians(degrees)
    prediction = torch.tensor([[3.0, 0.0]])
    target = torch.tensor([[7 * math.cos(angle), 7 * math.sin(angle)]])
    assert cosine_loss(prediction, target).item() == pytest.approx(expected, abs=1e-6)


def test_match_loss_equals_a_numpy_count():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 7)) * 3, rng.normal(size=(2, 5, 7)) * 3
    found = match_loss(torch.tensor(x), torch.tensor(y))
    assert found.shape == (2,)
    for image in range(2):
        a, b = x[image], y[image]  # (5, 7)
        cosine = np.mean(1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
        difference = np.abs(a - b)
        smooth_l1 = np.where(difference < 2, 0.5 * difference**2 / 2, difference - 1).mean()  # turning point 2
        assert found[image].item() == pytest.approx(0.9 * cosine + 0.1 * smooth_l1, rel=1e-5)


def test_losses_of_half_precision_inputs_are_float32():
    # In float16 the squared length of this vector overflows and the cosine is NaN.
    big = torch.full((1, 1, 512), 300.0, dtype=torch.float16)
    loss = match_loss(big, big)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0, abs=1e-6)


def test_features_meet_on_the_larger_grid_as_torchvision_resizes():
    assert common_grid((14, 14), (16, 16)) == (16, 16)
    assert common_grid((4, 9), (6, 5)) == (6, 9)
    assert common_grid((14, 14), (16, 16), "smaller") == (14, 14)
    maps = torch.randn(2, 3, 4, 5)
    rows = maps.flatten(2).transpose(1, 2)
    expected = F2.resize(maps, [8, 7], antialias=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resize_grid(rows, (4, 5), (8, 7)), expected)
    assert torch.equal(resize_grid(rows, (4, 5), (4, 5)), rows)
