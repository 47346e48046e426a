"""Multiplicative weight noise while training, W * (1 + std * noise), as in DAMP (Trinh et al., arXiv 2406.16540)."""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from transformers_radio.modeling import RadioModel


def add_weight_noise(model: RadioModel, std: float) -> None:
    """Gives the Linears in a student's blocks noise while training, in place; none in eval mode or the state dict.

    Every forward pass draws a standard normal number for each entry of a weight, from the default generator of the
    weight's device; gradient checkpointing restores that generator when it computes a block again. Each process has
    its own noise if its generator has its own seed. A spectral reparametrization is applied before the noise,
    whichever was added first.

    Args:
        std: standard deviation of the noise as a share of the weight, between 0 and 1.
    """
    if not 0 < std < 1:
        raise ValueError(f"the standard deviation of the weight noise is {std}; expected a number between 0 and 1")
    for module in (module for block in model.blocks for module in block.modules()):
        if isinstance(module, nn.Linear):
            # Not a parametrization, which would rename the weight; a bound method follows the module into a deepcopy.
            module.__dict__.update(weight_noise_std=std, forward=MethodType(_noisy_forward, module))


def _noisy_forward(linear: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = linear.weight
    if linear.training:
        noise = torch.randn(weight.shape, device=weight.device, dtype=torch.float32)
        weight = (weight * (1 + linear.weight_noise_std * noise)).to(weight.dtype)
    return F.linear(hidden_states, weight, linear.bias)
