"""Linear layers of a fused student in bfloat16 on a CPU."""

from typing import Any

import torch
from torch import nn

from .caching_radio import WeightCache, is_elusive
from .inputs_radio import can_read_values


class RadioPackedLinear(nn.Linear):
    """As `nn.Linear`, but oneDNN reorders the weight once instead of in every call.

    The reordered weight is kept beside the weight itself, which moves, casts and copies of the model need. With
    derivatives and while compiling the layer computes as the ordinary one; a cast or a move to a device makes it one.
    """

    _cache: WeightCache

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self._can_use_packed(input):
            return super().forward(input)
        ops = torch.ops.mkldnn
        packed = self._cache.get("packed", [self.weight], lambda: ops._reorder_linear_weight(self.weight))
        return ops._linear_pointwise(input, packed, self.bias, "none", [], "")

    def _can_use_packed(self, input: torch.Tensor) -> bool:
        return (
            can_read_values(input)
            and _has_units_for(input)
            and _has_units_for(self.weight)
            and not is_elusive(self.weight)
            and not any(_has_derivative(tensor) for tensor in (input, self.weight, self.bias) if tensor is not None)
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._len_torch_dispatch_stack()  # what counts FLOPs or bytes knows the ordinary product
        )

    def _apply(self, fn, recurse=True):
        self._cache.clear()
        super()._apply(fn, recurse)
        is_plain = type(self) is RadioPackedLinear and "forward" not in vars(self)  # hooks of accelerate hold a method
        if is_plain and not _has_units_for(self.weight):
            self.__class__ = nn.Linear  # which quantization looks for
            del self._cache
        return self

    def train(self, mode: bool = True):
        self._cache.clear()  # as WeightCache asks for
        return super().train(mode)


def check_merged(model: nn.Module):
    for name, part in model.named_modules():
        if hasattr(part, "get_base_layer") or nn.utils.parametrize.is_parametrized(part):  # the first marks PEFT's
            raise ValueError(f"{name} has adapters or parametrizations: merge_and_unload() them before fuse().")


def pack_linears(model: nn.Module):
    """Turns the Linears in bfloat16 on a CPU that has units for it into packed ones, in place."""
    # the operators that torch's own compiler uses for CPUs; a build without oneDNN lacks them
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_linear_pointwise") or not ops._is_mkldnn_bf16_supported():
        return
    linears: list[Any] = [part for part in model.modules() if type(part) is nn.Linear]
    for linear in linears:
        if _has_units_for(linear.weight):
            linear.__class__, linear._cache = RadioPackedLinear, WeightCache()  # hooks stay


def _has_derivative(tensor: torch.Tensor) -> bool:
    tangent = torch.autograd.forward_ad.unpack_dual(tensor).tangent
    return tangent is not None or (torch.is_grad_enabled() and tensor.requires_grad)


def _has_units_for(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
