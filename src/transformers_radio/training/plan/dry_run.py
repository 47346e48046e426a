"""One training step of a group in which nothing is computed: its shapes are checked, its FLOPs and memory counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher, TeacherOutput
from transformers_radio.training.distill import Distillation, build_distillation
from transformers_radio.training.groups import Group
from transformers_radio.training.recipe import Recipe

aten = torch.ops.aten
# The counter does not know attention's fused kernel for CPUs, which keeps as little as those for GPUs.
FUSED_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: (lambda q, k, v, *_, **__: sdpa_flop(q, k, v)),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop(grad, q, k, v)
    ),
}
ATTENTION = {*FUSED_ATTENTION, aten.bmm}


@dataclass(frozen=True)
class TeacherCost:
    """One image at the teacher's own size: FLOPs of its forward pass, and its output, on the meta device."""

    flops: int
    output: TeacherOutput


@dataclass(frozen=True)
class StepCost:
    """The student and its heads in one pass of a group.

    FLOPs are per image: two for each multiply-add of matrix products and convolutions, none for anything else. Blocks
    that gradient checkpointing computes again count again. Attention is global, the most that drawn windows need.

    Attributes:
        forward_flops, backward_flops: per image.
        attention_flops: the part of both that is attention's products of queries, keys and values.
        activation_bytes: what autograd keeps for the backward pass of the whole micro batch, weights in half precision
            included; with gradient checkpointing, also what one block keeps.
        parameters: their number in the student and the balancing of this stage.
    """

    forward_flops: int
    backward_flops: int
    attention_flops: int
    activation_bytes: int
    parameters: int

    @property
    def flops(self) -> int:
        return self.forward_flops + self.backward_flops


@torch.no_grad()
def run_teacher(teacher: Teacher) -> TeacherCost:
    """One image through a teacher.

    Args:
        teacher: on the meta device.

    Raises:
        RuntimeError: its output breaks what it promises (widths, grid).
    """
    pixels = torch.empty(1, 3, teacher.image_size, teacher.image_size, device="meta", dtype=teacher.dtype)
    with FlopCounterMode(display=False) as counter:
        output = teacher.encode(pixels)
    teacher._check_output(output, batch=1)
    return TeacherCost(counter.get_total_flops(), output)


def run_stage(
    recipe: Recipe, stage: str, groups: list[Group], student: RadioModel, outputs: dict[str, TeacherOutput]
) -> dict[str, StepCost]:
    """Targets, student, losses and backward of one pass of each group, on tensors that have shapes and no memory.

    Spectral reparametrization and torch.compile are left out: the first adds only products of a matrix and a vector.
    Attention in Flash's kernels counts as PyTorch's own, which needs as much.

    Args:
        groups: those of the stage.
        student: on the meta device, with the heads of all stages.
        outputs: those of the groups' teachers, as `run_teacher` returns them.

    Returns:
        Group -> cost.
    """
    attention = "eager" if recipe.student.attn_implementation == "eager" else "sdpa"
    plain = replace(recipe.student, spectral_reparam=False, compile=False, attn_implementation=attention)
    distillation = build_distillation(replace(recipe, student=plain), stage, student).train()
    drawn = {group.name: student.training_options(group.resolution, group.resolution) for group in groups}
    # Not the meta device itself: it has no autocast, and no fused attention.
    with FakeTensorMode(allow_non_fake_inputs=True):
        distillation.to_empty(device="cpu")
        return {
            # an option that is drawn, such as a window, saves work; 0 leaves it out
            group.name: _run_group(recipe, group, distillation, outputs, dict.fromkeys(drawn[group.name], 0))
            for group in groups
        }


def _run_group(
    recipe: Recipe,
    group: Group,
    distillation: Distillation,
    outputs: dict[str, TeacherOutput],
    options: dict[str, Any],
) -> StepCost:
    """`options`: keyword arguments of the student's forward."""
    distillation.zero_grad()
    images = group.micro_batch_size
    pixels = torch.empty(images, 3, group.resolution, group.resolution)
    targets = {name: _for_images(outputs[name], images) for name in group.teachers}
    recomputed = distillation.student.blocks[-1:] if recipe.student.gradient_checkpointing else []
    with _inputs(recomputed) as inputs, _autocast(recipe), _kept(distillation) as kept, _counter() as forward:
        totals, _ = distillation(pixels, targets, **options)  # (B,)
    with _counter() as backward:
        totals.sum().backward()
    for block, (arguments, keywords) in zip(recomputed, inputs, strict=True):
        with _autocast(recipe), _kept(distillation) as kept_by_block:
            block.forward(*arguments, **keywords)  # __call__ would checkpoint
        kept.update(kept_by_block)
    return StepCost(
        forward_flops=forward.get_total_flops() // images,
        backward_flops=backward.get_total_flops() // images,
        attention_flops=sum(_attention_flops(counter) for counter in (forward, backward)) // images,
        activation_bytes=sum(kept.values()),
        parameters=sum(parameter.numel() for parameter in distillation.parameters()),
    )


@contextmanager
def _inputs(blocks: list[nn.Module]) -> Iterator[list[tuple[tuple, dict[str, Any]]]]:
    """Positional and keyword arguments of each call of these blocks, in order."""
    seen: list[tuple[tuple, dict[str, Any]]] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, *inputs: seen.append(inputs), with_kwargs=True) for block in blocks
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def _for_images(output: TeacherOutput, images: int) -> TeacherOutput:
    """float32, as teachers hand their outputs over."""
    summary = None if output.summary is None else torch.empty(images, output.summary.shape[-1])
    return TeacherOutput(summary, torch.empty(images, *output.features.shape[1:]), output.grid)


def _autocast(recipe: Recipe) -> torch.autocast:
    dtype = torch.float16 if recipe.mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast("cpu", dtype, enabled=recipe.mixed_precision != "no")


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=FUSED_ATTENTION)


def _attention_flops(counter: FlopCounterMode) -> int:
    return sum(count for operator, count in counter.get_flop_counts()["Global"].items() if operator in ATTENTION)


@contextmanager
def _kept(module: nn.Module) -> Iterator[dict[int, int]]:
    """Storage -> bytes of all that autograd keeps, but for the module's own parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
