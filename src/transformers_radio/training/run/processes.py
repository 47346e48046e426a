"""Accelerate's process group and precision, as the training loop needs them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    LoggerType,
    broadcast_object_list,
    parse_flag_from_env,
)

from transformers_radio.precision import resolve_dtype, resolve_mixed_precision, warn_if_slow
from transformers_radio.training.recipe import Recipe

from .folder import recorded_recipe

# Processes wait this long for another one: for a download, a checkpoint on a slow disk, the listing of a large folder.
LONGEST_WAIT = timedelta(hours=6)

Result = TypeVar("Result")


def build_accelerator(recipe: Recipe) -> Accelerator:
    """DDP, FSDP2 or one process: whatever `accelerate launch` was told.

    Raises:
        ValueError: the tracker is not installed; fp16 without a gradient scaler; gradient accumulation by Accelerate;
            version 1 of FSDP, which cannot skip the reduction of the gradients in a pass.
    """
    if recipe.tracker is not None and recipe.tracker not in LoggerType.list():
        raise ValueError(
            f"tracker is {recipe.tracker!r}; expected one of Accelerate's ({', '.join(LoggerType.list())}), or null"
        )
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        log_with=recipe.tracker,
        project_dir=recipe.output_dir,
        # Every pass reaches every weight, and buffers are the same on all processes: DDP need not search or send any.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if recipe.tracker and not accelerator.log_with:  # Accelerate would continue without it
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
        # Accelerate shards on accelerators only. PyTorch can on CPUs too, where this loop is tested.
        plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        # Both, as the partial state overwrites the other whenever that is read.
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


def settle_precision(recipe: Recipe) -> Recipe:
    """The recipe with every `auto` precision replaced by the one that this run has. Called by every process.

    A run in output_dir keeps the precision that it began with, on whatever machine; a new run takes the one that is
    fast on the main process's device. Logs a warning where the result is slow on a CPU.
    """
    # Without an accelerator, Accelerate would take each process of a group for the only one.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)

    def settle() -> Recipe:
        before = recorded_recipe(recipe) if uses_auto_precision(recipe) else None
        settled = resolve_precision(recipe, state.device, before)
        warn_of_slow_precision(settled, state.device)
        return settled

    return on_main_process(state, settle)


def uses_auto_precision(recipe: Recipe) -> bool:
    return "auto" in (recipe.mixed_precision, *(teacher.dtype for teacher in recipe.teachers.values()))


def resolve_precision(recipe: Recipe, device: torch.device, before: Recipe | None = None) -> Recipe:
    """A copy without `auto`: each is replaced by its value in `before`, if given, or by what is fast on the device."""
    mixed_precision = recipe.mixed_precision
    if mixed_precision == "auto" and before is not None:
        mixed_precision = before.mixed_precision
    dtypes = {} if before is None else {name: teacher.dtype for name, teacher in before.teachers.items()}
    teachers = {}
    for name, teacher in recipe.teachers.items():
        dtype = dtypes.get(name, "auto") if teacher.dtype == "auto" else teacher.dtype
        teachers[name] = replace(teacher, dtype=resolve_dtype(dtype, device))
    return replace(recipe, mixed_precision=resolve_mixed_precision(mixed_precision, device), teachers=teachers)


def warn_of_slow_precision(recipe: Recipe, device: torch.device) -> None:
    settings = {"mixed_precision": (recipe.mixed_precision, "auto")}
    settings |= {f"teachers.{name}.dtype": (teacher.dtype, "auto") for name, teacher in recipe.teachers.items()}
    warn_if_slow(settings, device)


@contextmanager
def threads_beside_workers(workers: int, device: torch.device) -> Iterator[None]:
    """On a CPU, leaves torch only the threads whose cores the data workers of this process do not need.

    A thread that shares its core with a worker makes all other threads wait for it after every product. Where
    OMP_NUM_THREADS is set, that holds instead.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # cores of this process
        torch.set_num_threads(max(1, min(before, share - workers)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_main_process(accelerator: Accelerator | PartialState, function: Callable[[], Result]) -> Result:
    """Calls a function on the main process; every process returns its result or raises its error."""
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
