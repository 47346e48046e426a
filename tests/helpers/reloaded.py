"""Outputs of a model and of the same model read from its files."""

import torch


def assert_same_but_for_rounding(found: torch.Tensor, expected: torch.Tensor):
    """Equal to 1e-5 of the largest value, for weights that are equal bit for bit.

    MKL's products on AMD's processors depend in their last bits on the address of a matrix, and weights in a mapped
    file are aligned to 8 bytes only.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module):
    """Bit for bit, under the same names."""
    first, second = found.state_dict(), expected.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
