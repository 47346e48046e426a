"""Accelerate's process group, as this loop needs it."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list

from .recipe import Recipe

Result = TypeVar("Result")


def build_accelerator(recipe: Recipe) -> Accelerator:
    """DDP, FSDP2 or one process: whatever `accelerate launch` was told.

    Raises:
        ValueError: the tracker is not installed; fp16 without a gradient scaler; gradient accumulation by Accelerate;
            FSDP in its first version, which cannot leave out the gradients' reduction in a pass.
    """
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        log_with=recipe.tracker,
        project_dir=recipe.output_dir,
        # Every pass reaches every weight, and buffers are the same everywhere: nothing has to be searched or sent.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if recipe.tracker and not accelerator.log_with:  # Accelerate would go on without it
        raise ValueError(
            f"tracker is {recipe.tracker!r}, which is not installed here; install it, or set tracker=null for "
            "metrics.jsonl alone"
        )
    if recipe.mixed_precision == "fp16" and accelerator.scaler is None:  # Accelerate would compute in float32
        raise ValueError(
            f"mixed_precision is 'fp16', but there is no gradient scaler for device {accelerator.device.type!r}; set "
            "mixed_precision=bf16 or no"
        )
    if accelerator.gradient_accumulation_steps != 1:  # it would divide the loss by their number
        raise ValueError(
            f"gradient_accumulation_steps is {accelerator.gradient_accumulation_steps} (of accelerate launch, or "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS); expected 1, as the recipe says how a batch is accumulated: set "
            "micro_batch_size beside batch_size"
        )
    wants_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wants_fsdp and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on accelerators only. PyTorch does on CPUs too, where this very loop is tried out.
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        # The partial state overwrites the other whenever somebody asks for it.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":  # Accelerate's policy would round the losses
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "fsdp_version is 1; set it to 2 in Accelerate's config file, as recipes/accelerate/fsdp2.yaml"
        )
    return accelerator


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """The main process's result or error, on every process."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (OSError, ValueError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
