"""PHI-S against numpy: covariances, variances after standardization, and heads with the inverse folded in."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from transformers_radio.training.phi_s.rotation import FeatureMoments, PhiS


def skewed(n, channels, seed=0):
    """Correlated features whose channels differ in mean and by orders of magnitude in spread: (n, C) float64."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels)) * np.logspace(-2, 1, channels)
    return rng.normal(size=(n, channels)) @ mixing.T + rng.normal(size=channels) * 20


def moments_of(x):
    moments = FeatureMoments(x.shape[-1])
    moments.update(torch.as_tensor(x))
    return moments


def test_moments_equal_numpys_whole_in_chunks_and_merged():
    x = skewed(500, 7) + 1e6  # a mean that would eat the digits of a plain sum of squares
    whole, chunked, other = FeatureMoments(7), FeatureMoments(7), FeatureMoments(7)
    whole.update(torch.as_tensor(x.reshape(5, 10, 10, 7)))
    for rows in np.split(x[:300], [1, 50, 51, 200]):
        chunked.update(torch.as_tensor(rows))
    chunked.update(torch.empty(0, 7))
    other.merge(FeatureMoments(7))
    other.update(torch.as_tensor(x[300:]))
    chunked.merge(other)
    for moments in (whole, chunked):
        assert moments.count == 500
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance(), np.cov(x, rowvar=False), rtol=1e-8, atol=1e-8)


def test_moments_of_all_processes_are_those_of_all_vectors():
    x = skewed(301, 7)
    parts = [moments_of(x[:100]), moments_of(x[100:]), FeatureMoments(7)]  # one process has seen nothing
    given, barrier = [torch.empty(0)] * 3, Barrier(3, timeout=30)

    def reduce_as(rank):
        def sum_over_processes(value):
            given[rank] = value
            barrier.wait()
            total = given[0] + given[1] + given[2]
            barrier.wait()
            return total

        parts[rank].all_reduce(sum_over_processes)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(reduce_as, range(3)))
    for moments in parts:
        assert moments.count == 301
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance(), np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)


def test_moments_refuse_what_is_not_finite_too_little_or_of_another_width():
    moments = FeatureMoments(4)
    moments.update(torch.randn(4, 4))
    bad = torch.randn(2, 3, 4)
    bad[0, 1, 2], bad[1, 0, 0] = torch.nan, torch.inf
    with pytest.raises(FloatingPointError, match="2 of 6 feature vectors"):
        moments.update(bad)
    assert moments.count == 4
    with pytest.raises(ValueError, match=r"^4 feature vectors are too few.*4 channels.*at least 5"):
        moments.covariance()
    moments.update(torch.randn(4))  # five suffice
    assert moments.covariance().isfinite().all()
    with pytest.raises(ValueError, match=r"\(6, 3\).*4 channels"):
        moments.update(torch.randn(6, 3))
    with pytest.raises(ValueError, match="all 9 feature vectors are equal"):
        PhiS.from_moments(moments_of(np.full((9, 4), 3.0)))


@pytest.mark.parametrize("channels", [12, 36, 64])
def test_every_channel_has_variance_one_and_the_shape_of_the_cloud_stays(channels):
    x = skewed(4000, channels)
    phi_s = PhiS.from_moments(moments_of(x))
    y = phi_s.standardize(torch.as_tensor(x)).numpy()
    covariance = np.cov(y, rowvar=False)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(np.diag(covariance), 1, rtol=1e-9)
    before = np.linalg.eigvalsh(np.cov(x, rowvar=False))  # no whitening: the spectrum is only scaled
    np.testing.assert_allclose(np.linalg.eigvalsh(covariance), before / before.mean(), rtol=1e-8, atol=1e-10)
    assert phi_s.phi == pytest.approx(np.sqrt(np.var(x, axis=0, ddof=1).mean()), rel=1e-10)  # trace over channels


def restore(phi_s, y):
    """The inverse of `standardize`: phi R^T y + mean."""
    return phi_s.phi * (y.to(phi_s.mean) @ phi_s.rotation) + phi_s.mean


def test_standardize_is_a_rotation_and_a_scale():
    x = torch.as_tensor(skewed(400, 12)).reshape(4, 10, 10, 12)
    phi_s = PhiS.from_moments(moments_of(x.numpy()))
    torch.testing.assert_close(restore(phi_s, phi_s.standardize(x)), x, rtol=1e-12, atol=1e-11)
    single = phi_s.to(dtype=torch.float32)
    standardized = single.standardize(x)
    assert standardized.dtype == torch.float32
    torch.testing.assert_close(standardized.double(), phi_s.standardize(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(restore(single, standardized).double(), x, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("upsample", [1, 2])
def test_a_folded_linear_predicts_restored_features(upsample, bias, dtype):
    phi_s = PhiS.from_moments(moments_of(skewed(400, 12))).to(dtype=dtype)
    linear = nn.Linear(9, upsample * upsample * 12, bias=bias)
    x = torch.randn(5, 9)
    folded = nn.Linear(9, linear.out_features)
    folded.load_state_dict(dict(zip(("weight", "bias"), phi_s.fold(linear), strict=True)))
    assert folded.weight.dtype == folded.bias.dtype == torch.float32
    positions = linear(x).reshape(5, upsample, upsample, 12)  # channel order (u1, u2, C)
    expected = restore(phi_s, positions).float().reshape(5, -1)
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="14 outputs; expected a multiple of 12"):
        phi_s.fold(nn.Linear(9, 14))


def test_tensors_survive_a_safetensors_file(tmp_path):
    phi_s = PhiS.from_moments(moments_of(skewed(400, 12)))
    save_file(phi_s.to_tensors(), tmp_path / "phi_s.safetensors")
    loaded = PhiS.from_tensors(load_file(tmp_path / "phi_s.safetensors"))
    assert loaded.phi == phi_s.phi
    assert torch.equal(loaded.mean, phi_s.mean) and torch.equal(loaded.rotation, phi_s.rotation)
