"""Tensors that follow from weights, such as a resized position table: computed once per size while weights rest."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import nn

from .inputs_radio import in_function_transform

_MAX_ENTRIES = 16


class WeightCache:
    """What a module computes from its weights in evaluation, by key.

    It notices writes in place (optimizer steps, loading), other tensors in the place of the weights, moves and casts.
    What it cannot notice are writes through `.data`: the module clears the cache in `train` and `eval`.
    """

    def __init__(self):
        self._values: dict = {}
        self._state: tuple = ()
        self._held: list[torch.Tensor] = []

    def get(self, key: Hashable, weights: Sequence[torch.Tensor], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`compute()`, or what it returned before for this key and these weights."""
        # while compiling nothing can be kept, and in a function transform a result may be a stand-in that ends with it
        if torch.compiler.is_compiling() or in_function_transform() or any(map(is_elusive, weights)):
            return compute()
        # writes in place raise the version; a new tensor has a new address, as long as the old one is held here
        state = tuple((weight._version, weight.data_ptr(), weight.dtype, weight.device) for weight in weights)
        if state != self._state or len(self._values) >= _MAX_ENTRIES:
            self.clear()
            self._state, self._held = state, [weight.data for weight in weights]
        key = (key, torch.is_inference_mode_enabled())
        value = self._values.get(key)  # once: other threads may clear the cache
        if value is None:
            value = self._values[key] = compute()
        return value

    def clear(self):
        self._values, self._state, self._held = {}, (), []

    def __reduce__(self):  # copies and pickles start empty: packed weights can be neither copied nor written
        return WeightCache, ()


def is_elusive(weight: torch.Tensor) -> bool:
    """Whether what is computed from this weight must not be kept."""
    return (
        type(weight) is not nn.Parameter  # a tensor in its place for one call (torch.func.functional_call)
        or (torch.is_grad_enabled() and weight.requires_grad)  # the result carries a graph
        or type(weight.data) is not torch.Tensor  # fake or sharded tensors
        or weight.is_inference()  # has no version
    )
