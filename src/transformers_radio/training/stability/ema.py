"""Exponential moving average of the student's weights."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA:
    """The weighted mean of the weights after each step, in float32, for every parameter and batch norm's statistics.

    A step counts `decay` times as much as the next one. The weights before the first step have no part in it: a batch
    norm's variance, which starts at 1, would outweigh what training finds for thousands of steps.

    Sharded parameters (FSDP2) have averages sharded the same way; all processes then call `state_dict` and
    `load_state_dict` together.

    Args:
        model: what is trained. Create the average after wrapping or sharding it, from the wrapped or the unwrapped
            model; the averages have the names of its parameters.
        decay: between 0 and 1.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"the decay of the weight average is {decay}; expected a number between 0 and 1")
        self.model, self.decay = model, decay
        self.averages = {name: weight.float().clone() for name, weight in self._weights()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Call after each optimizer step, with its number from 1."""
        rate = (1 - self.decay) / (1 - self.decay**number)  # 1 - decay, corrected for the bias of the first steps
        for name, weight in self._weights():
            _local(self.averages[name]).lerp_(_local(weight).float(), rate)

    def state_dict(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """Parameter's name -> its whole average, on the CPU; empty without `keep`, for processes that need none."""
        whole = {}
        for name, average in self.averages.items():
            gathered = average.full_tensor() if isinstance(average, DTensor) else average
            if keep:
                whole[name] = gathered.to("cpu", copy=True)
        return whole

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Takes what `state_dict` returned, for a model that may be sharded differently.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        shapes = {name: tuple(average.shape) for name, average in self.averages.items()}
        given = {name: tuple(average.shape) for name, average in state_dict.items()}
        if given != shapes:
            wrong = sorted({name for name, _ in given.items() ^ shapes.items()})
            raise ValueError(
                f"the saved averages do not fit this model: {len(wrong)} names or shapes differ, e.g. {wrong[0]}: "
                f"saved {given.get(wrong[0])}, expected {shapes.get(wrong[0])}; use those of the same student"
            )
        for name, average in self.averages.items():
            whole = state_dict[name].to(average.device, torch.float32)
            if isinstance(average, DTensor):
                whole = distribute_tensor(whole, average.device_mesh, average.placements)
            _local(average).copy_(_local(whole))

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass in eval mode leaves gathered copies in place of the parameters
        for name, weight in self.model.named_parameters():
            yield name, weight.detach()
        for name, statistic in self.model.named_buffers():
            if name.endswith(("running_mean", "running_var")):  # those of the averaged weights, nearly
                yield name, statistic


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
