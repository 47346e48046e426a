"""What a recipe will do, counted without running it: dims, resolutions, parameters, FLOPs and memory an image."""

import copy
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher

from .checks import check_disk, check_resolutions
from .distill import TeacherShape, build_student
from .partition import Group, stage_groups
from .placement import load_teacher
from .recipe import Recipe, StageRecipe


@dataclass
class StageCost:
    """Of one image at a stage's resolution. Memory is what autograd keeps for the backward pass, in bytes."""

    forward_flops: int
    backward_flops: int
    activation_bytes: int


def student_cost(
    student: RadioModel, resolution: int, adaptors: list[str], gradient_checkpointing: bool = False
) -> StageCost:
    """Counts one training step of one image on the meta device: nothing is computed.

    FLOPs are those of matrix products and convolutions, two for each multiply-add. Attention is counted as global, the
    most that a stage with sampled windows needs; memory is that of float32.
    """
    config = copy.deepcopy(student.config)
    config.train_window_sizes = None
    with torch.device("meta"):
        meta = type(student)(config).train()
    if gradient_checkpointing:
        meta.gradient_checkpointing_enable()
    parameters = {parameter.untyped_storage()._cdata for parameter in meta.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    pixels = torch.rand(1, 3, resolution, resolution, device="meta")
    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = meta(pixels, adaptors=adaptors)
    outputs = [tensor for head in output.adaptors.values() for tensor in (head.summary, head.features)]
    with FlopCounterMode(display=False) as backward:
        sum(tensor.sum() for tensor in outputs if tensor is not None).backward()  # type: ignore[union-attr]
    return StageCost(forward.get_total_flops(), backward.get_total_flops(), sum(kept.values()))


def teacher_flops(teacher: Teacher) -> int:
    """Forward FLOPs of one image at the teacher's own size, counted on the meta device."""
    meta = copy.deepcopy(teacher).to("meta")
    pixels = torch.empty(1, 3, teacher.image_size, teacher.image_size, device="meta", dtype=teacher.dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta.encode(pixels)
    return counter.get_total_flops()


def print_plan(recipe: Recipe, processes: int = 1) -> None:
    """Prints the tables of `transformers-radio plan`; raises what training would raise before its first step."""
    console = Console()
    teachers = {name: load_teacher(name, spec) for name, spec in recipe.teachers.items()}
    student = build_student(recipe, {name: TeacherShape.of(teacher) for name, teacher in teachers.items()})
    groups = {
        name: stage_groups(name, stage, list(recipe.teachers), world_size=processes)
        for name, stage in recipe.stages.items()
    }
    check_resolutions(student, groups)
    check_disk(recipe, student)

    table = Table(title="teachers (frozen)", title_justify="left")
    for column in (
        "name",
        "type",
        "image size",
        "grid",
        "summary",
        "features",
        "params (M)",
        "weights MB",
        "GFLOPs/image",
    ):
        table.add_column(column, justify="left" if column in ("name", "type") else "right")
    flops = {}
    for name, teacher in teachers.items():
        flops[name] = teacher_flops(teacher)
        grid = teacher.image_size // teacher.patch_size
        table.add_row(
            name,
            recipe.teachers[name].type,
            str(teacher.image_size),
            f"{grid}x{grid}",
            str(teacher.summary_dim or "-"),
            str(teacher.feature_dim),
            f"{_millions(teacher):.2f}",
            f"{_bytes(teacher) / 1e6:,.1f}",
            f"{flops[name] / 1e9:.2f}",
        )
    console.print(table)

    heads = sum(parameter.numel() for parameter in student.adaptors.parameters()) / 1e6
    config = student.config
    console.print(
        f"student: {_millions(student) - heads:.2f} M parameters + {heads:.2f} M in the heads; width "
        f"{config.hidden_size}, {config.num_hidden_layers} layers, patch {config.patch_size}, "
        f"{config.num_cls_tokens} CLS tokens, {config.num_registers} registers"
    )

    table = Table(title="stages", title_justify="left")
    for column in (
        *("stage", "group", "resolution", "grid", "steps", "batch", "micro x accumulation x processes"),
        *("samples seen", "student GFLOPs/image", "teachers GFLOPs/image", "activations MB/image"),
    ):
        table.add_column(column, justify="left" if column in ("stage", "group") else "right")
    seen = 0
    for name, stage in recipe.stages.items():
        for group in groups[name]:
            table.add_row(*_group_row(name, stage, group, recipe, student, flops))
            seen += _samples(stage, group)
    console.print(table)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    console.print(
        f"samples seen: {seen:,}; weights, gradients, AdamW's moments: {4 * weights / 1e6:,.1f} MB a process"
    )


def _group_row(
    stage_name: str, stage: StageRecipe, group: Group, recipe: Recipe, student: RadioModel, flops: dict[str, int]
) -> list[str]:
    cost = student_cost(student, group.resolution, list(group.teachers), recipe.student.gradient_checkpointing)
    grid = group.resolution // student.patch_size
    return [
        stage_name,
        ", ".join(group.teachers),
        str(group.resolution),
        f"{grid}x{grid}",
        f"{stage.steps:,}",
        f"{group.batch_size:,}",
        f"{group.micro_batch_size} x {group.passes} x {len(group.ranks)}",
        f"{_samples(stage, group):,}",
        f"{(cost.forward_flops + cost.backward_flops) / 1e9:.2f}",
        f"{sum(flops[teacher] for teacher in group.teachers) / 1e9:.2f}",
        f"{cost.activation_bytes / 1e6:.1f}",
    ]


def _samples(stage: StageRecipe, group: Group) -> int:
    return group.batch_size * sum(group.takes_part(step) for step in range(stage.steps))


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
