"""Linear layers of a fused student on a CPU."""

import copy
from typing import Any

import torch
from torch import nn

from .caching_radio import WeightCache, is_elusive
from .inputs_radio import can_read_values

_LEAST_ELEMENTS = 2**18  # of a weight that is worth packing: products with smaller ones gain less than our checks cost


class RadioPackedLinear(nn.Linear):
    """As `nn.Linear`, but oneDNN reorders the weight once instead of in every call.

    The reordered weight is kept beside the weight itself, which moves, casts and copies of the model need. With
    derivatives and while compiling the layer computes as the ordinary one. It becomes one by a move to a device, by a
    cast to another dtype than float32 and bfloat16, and in copies.

    Raises:
        ValueError: torch.ao quantizes the layer in place, which would leave it out.
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
            and "forward" not in vars(self)  # as accelerate puts there, whose offloading must not meet a second copy
            and _gains_from_packing(self.weight)
            and input.dtype == self.weight.dtype
            and input.device == self.weight.device
            and input.shape[-1:] == self.weight.shape[1:]  # torch names other widths, oneDNN does not
            and (self.bias is None or self.bias.is_contiguous())  # the operator would read the memory between
            and not is_elusive(self.weight)
            and not any(_has_derivative(tensor) for tensor in (input, self.weight, self.bias) if tensor is not None)
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._len_torch_dispatch_stack()  # what counts FLOPs or bytes knows the ordinary product
        )

    def _apply(self, fn, recurse=True):
        self._cache.clear()
        super()._apply(fn, recurse)
        if not _gains_from_packing(self.weight):
            self._unpack()
        return self

    def _unpack(self):
        if type(self) is RadioPackedLinear and "forward" not in vars(self):  # hooks of accelerate hold the method
            self.__class__ = nn.Linear
            del self._cache

    # torch.ao's quantization takes layers whose class is nn.Linear, passes others over without a word, and works on a
    # copy of the model unless told
    def __deepcopy__(self, memo: dict):
        twin = self.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._unpack()
        return twin

    def _refuse_quantization(self, value):
        raise ValueError("fuse() packed this model's Linears; quantize a copy of it: copy.deepcopy(model).")

    qconfig = property(fset=_refuse_quantization)

    def train(self, mode: bool = True):
        self._cache.clear()  # as WeightCache asks for
        return super().train(mode)


def check_merged(model: nn.Module):
    for name, part in model.named_modules():
        if hasattr(part, "get_base_layer") or nn.utils.parametrize.is_parametrized(part):  # the first marks PEFT's
            raise ValueError(f"{name} has adapters or parametrizations: merge_and_unload() them before fuse().")


def pack_linears(model: nn.Module):
    """Turns the Linears into packed ones where the processor gains from it, in place."""
    linears: list[Any] = [part for part in model.modules() if type(part) is nn.Linear]
    for linear in linears:
        if _gains_from_packing(linear.weight):
            linear.__class__, linear._cache = RadioPackedLinear, WeightCache()  # hooks stay


def _has_derivative(tensor: torch.Tensor) -> bool:
    tangent = torch.autograd.forward_ad.unpack_dual(tensor).tangent
    return tangent is not None or (torch.is_grad_enabled() and tensor.requires_grad)


def _gains_from_packing(weight: torch.Tensor) -> bool:
    # the operators that torch's own compiler uses for CPUs; a build without oneDNN lacks them
    has_operators = weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not has_operators or weight.numel() < _LEAST_ELEMENTS:
        return False
    if weight.dtype == torch.float32:
        return _gains_in_float32(torch.backends.cpu.get_cpu_capability())
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _gains_in_float32(capability: str) -> bool:
    if capability == "AVX2" and hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities().get("cpu_name", "").startswith("AMD")  # Intel's MKL is as fast on Intel's
    return capability == "AVX512"
