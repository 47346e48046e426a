"""What one forward pass costs, independent of the clock: FLOPs and the peak of memory."""

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from transformers_radio.training.plan.dry_run import FUSED_ATTENTION

# Results are known by these sentences: other words would make them other results.
FLOPS_RULE = "2 FLOPs a multiply-add of matrix products, convolutions and attention; nothing for the rest"
CUDA_MEMORY_RULE = "weights, input, and the most that torch's CUDA allocator held for one forward pass"
TENSOR_MEMORY_RULE = (
    "weights, input, and the largest sum of bytes of all tensors alive at once in one forward pass; what kernels "
    "take for themselves is not seen"
)


@torch.no_grad()
def count_flops(forward: Callable[[torch.Tensor], object], images: torch.Tensor) -> int:
    """FLOPs of `forward(images)`, counted while it runs once: see `FLOPS_RULE`.

    Attention counts the same in fused kernels and written out.
    """
    # not inference_mode, in which composite operators reach the counter before they are decomposed
    with FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION) as counter:
        forward(images)
    return counter.get_total_flops()


@torch.no_grad()
def peak_memory(
    forward: Callable[[torch.Tensor], object], images: torch.Tensor, weights: Iterable[torch.Tensor] = ()
) -> int:
    """Bytes of the weights, the images and the most that `forward(images)` holds besides them, in one run.

    What only the first forward pass makes (caches, compiled kernels) counts too: run it once before.

    Args:
        weights: those that `forward` uses; see `module_tensors`. Tensors that share memory count once.
    """
    fixed = _storage_bytes([*weights, images])
    if images.device.type != "cuda":
        with AliveTensors() as alive:
            forward(images)
        return fixed + alive.peak
    # other models may be on the device: only what this forward pass adds counts
    torch.cuda.synchronize(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    forward(images)
    torch.cuda.synchronize(images.device)
    return fixed + torch.cuda.max_memory_allocated(images.device) - before


def memory_rule(device: torch.device) -> str:
    """How `peak_memory` counts on a device."""
    return CUDA_MEMORY_RULE if device.type == "cuda" else TENSOR_MEMORY_RULE


def module_tensors(module: nn.Module, without: str | None = None) -> list[torch.Tensor]:
    """Parameters and buffers, without those whose names start with `without`."""
    named = chain(module.named_parameters(), module.named_buffers())
    return [tensor for name, tensor in named if without is None or not name.startswith(without)]


class AliveTensors(TorchDispatchMode):
    """Bytes of the tensors that operators made and that are still referred to; views of one memory count once.

    Attributes:
        alive: bytes now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._bytes: dict[int, int] = {}  # storage -> bytes; 0 for a storage that was there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            self._meet(leaf, made_here=False)
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            self._meet(leaf, made_here=True)
        self.peak = max(self.peak, self.alive)
        return output

    def _meet(self, leaf: Any, made_here: bool) -> None:
        if not isinstance(leaf, torch.Tensor):
            return
        storage = leaf.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = storage.nbytes() if made_here else 0
        self.alive += self._bytes[key]
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.alive -= self._bytes.pop(key)


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
