"""Batch norm of a student in training: what it normalizes by, and running statistics that all processes share.

Torch's own would differ from process to process, would count a pass again that gradient checkpointing repeats, and
would see the empty passes of processes that have no images. Here the statistics of all passes of a step, over all
processes, move the running ones together, once per step: an update does not depend on the number of processes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class StepBatchNorm(nn.BatchNorm2d):
    """`norm`, whose weights and running statistics it shares, as a stage trains it.

    Attributes:
        process_group: processes whose images are normalized together in this pass, all with equally many; None for
            this process alone.
        idle: whether the pass has no images of its own; it is then normalized by the running statistics.
        seen: of the passes since the last step, weighted by their images: means (C,), variances (C,), images (1,).
    """

    seen: torch.Tensor

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        size = 2 * norm.num_features + 1
        self.register_buffer("seen", torch.zeros(size, device=norm.weight.device), persistent=False)
        _take_along(norm, self)
        self.process_group: Any = None
        self.idle = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _behind(self, self._normalize(input))

    def _normalize(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.idle:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.process_group is None:
            mean, variance = torch.zeros_like(self.seen[:-1]).chunk(2)
            # momentum 1: both are overwritten with the statistics of this pass
            output = F.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
        else:
            output, mean, variance = self._normalize_together(input)
        with torch.no_grad():
            self.seen += len(input) * torch.cat([mean, variance, mean.new_ones(1)])
        return output

    @torch.compiler.disable  # communication within an autograd function
    def _normalize_together(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As nn.SyncBatchNorm, which refuses CPUs; also the mean and the unbiased variance, (C,) each."""
        variance, mean = torch.var_mean(input.float(), dim=(0, 2, 3), correction=0)
        every = _Gathered.apply(torch.stack([mean, variance]), self.process_group)  # (processes, 2, C)
        means, variances = every.unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        # (C,) -> (C, 1, 1)
        output = torch.addcmul(shift[:, None, None], input.float(), scale[:, None, None]).to(input.dtype)
        count = len(every) * input.numel() // input.shape[1]
        return output, mean, variance * count / max(count - 1, 1)


class FrozenBatchNorm(nn.BatchNorm2d):
    """`norm`, whose weights it shares, with running statistics at rest in training as well."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps, norm.momentum, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        _take_along(norm, self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _behind(self, super().forward(input))

    def train(self, mode: bool = True):
        return super().train(False)


def _take_along(norm: nn.BatchNorm2d, new: nn.BatchNorm2d) -> None:
    """timm's BatchNormAct2d has a dropout and an activation."""
    for name, part in norm.named_children():
        new.add_module(name, part)


def _behind(norm: nn.BatchNorm2d, output: torch.Tensor) -> torch.Tensor:
    for part in norm.children():
        output = part(output)
    return output


class _Gathered(torch.autograd.Function):
    """Tensors of all processes of a group, stacked; the gradient is the sum of all processes' for one's own."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        every = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, tensor.contiguous(), group=group)
        return torch.stack(every)

    @staticmethod
    def backward(ctx, *gradients):
        total = gradients[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def replace_batch_norms(student: nn.Module, kind: str) -> None:
    """Puts the batch norms of `stages.NAME.batch_norm` in the place of the student's, with the same names."""
    for module in list(student.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats:
                setattr(module, name, FrozenBatchNorm(norm).eval() if kind == "frozen" else StepBatchNorm(norm))


class BatchNorms:
    """Those of a stage's student that train.

    Args:
        together: group of teachers -> the processes that are normalized together in its passes. All processes call
            this together, with the same groups.
    """

    def __init__(self, student: nn.Module, together: dict[str, tuple[int, ...]]):
        self.norms = [module for module in student.modules() if isinstance(module, StepBatchNorm)]
        self.process_groups: dict[str, Any] = {}
        for name, ranks in together.items():
            if self.norms and len(ranks) > 1:
                self.process_groups[name] = dist.new_group(list(ranks))

    def begin_pass(self, group: str | None) -> None:
        """Call before each forward pass, with the name of its group; None for one without images."""
        for norm in self.norms:
            norm.idle = group is None
            norm.process_group = None if group is None else self.process_groups.get(group)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the running statistics to those of the step's passes. All processes call this together."""
        if not self.norms:
            return
        seen = torch.cat([norm.seen for norm in self.norms])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(seen)
        for norm, sums in zip(self.norms, seen.split([len(norm.seen) for norm in self.norms]), strict=True):
            assert norm.running_mean is not None and norm.running_var is not None
            assert norm.num_batches_tracked is not None and norm.momentum is not None
            mean, variance = (sums[:-1] / sums[-1]).chunk(2)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance, norm.momentum)
            norm.num_batches_tracked += 1
            norm.seen.zero_()
