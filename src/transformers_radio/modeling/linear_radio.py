"""Linear layers of a fused student in bfloat16 on a CPU."""

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from .caching_radio import WeightCache, is_elusive
from .inputs_radio import can_read_values


class RadioPackedLinear(nn.Linear):
    """As `nn.Linear`, but oneDNN reorders the weight once instead of in every call.

    The reordered weight is kept beside the weight itself, which moves, casts and copies of the model need. With
    gradients, forward-mode derivatives and while compiling the layer computes as the ordinary one; a cast to another
    dtype or a move to another device makes it one.
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
            and not any(_is_differentiated(tensor) for tensor in (input, self.weight, self.bias) if tensor is not None)
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._len_torch_dispatch_stack()  # what counts FLOPs or bytes knows the ordinary product
        )

    def _apply(self, fn, recurse=True):
        self._cache.clear()
        super()._apply(fn, recurse)
        # not if parametrized, or hooked by accelerate, which holds on to the method
        is_plain = type(self) is RadioPackedLinear and "forward" not in vars(self)
        if is_plain and not _has_units_for(self.weight):
            self.__class__ = nn.Linear  # what quantizes Linears looks for this very class
            del self._cache
        return self

    def train(self, mode: bool = True):
        self._cache.clear()  # as WeightCache asks for
        return super().train(mode)


def check_merged(model: nn.Module):
    """Raises unless the weights of all layers are what the layers compute with: `fuse` reads nothing else."""
    for name, part in model.named_modules():
        # the first is the mark of PEFT's layers
        if hasattr(part, "get_base_layer") or parametrize.is_parametrized(part):
            raise ValueError(
                f"{name} has adapters or parametrizations: merge them (PEFT's merge_and_unload(), torch's "
                "remove_parametrizations) before model.fuse()."
            )


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


def _is_differentiated(tensor: torch.Tensor) -> bool:
    """Whether a product with it has a gradient or a forward-mode derivative, which packed weights know nothing of."""
    return (torch.is_grad_enabled() and tensor.requires_grad) or forward_ad.unpack_dual(tensor).tangent is not None


def _has_units_for(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
