"""What a recipe will do, counted without running it: dims, resolutions, FLOPs, memory, samples; time on real GPUs."""

import sys
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from transformers_radio.data import one_line
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher
from transformers_radio.teachers.known import is_on_disk, known_teacher
from transformers_radio.training.checks import check_disk, check_layout, unused_windows
from transformers_radio.training.groups import Group, stage_groups
from transformers_radio.training.recipe import Recipe, StageRecipe, TeacherRecipe, expand_paths, validate
from transformers_radio.training.run.folder import check_writable
from transformers_radio.training.run.processes import resolve_precision, warn_of_slow_precision
from transformers_radio.training.student import TeacherShape, build_student
from transformers_radio.training.teachers import load_teacher, sharding_ranks

from .cost import Load, stage_loads, stage_time, uneven_shares
from .dry_run import StepCost, TeacherCost, run_stage, run_teacher
from .gpus import find_gpu

# In characters: all tables fit.
PIPE_WIDTH = 240


def print_plan(recipe: Recipe, processes: int = 1, gpu: str | None = None, utilisation: float = 0.4) -> None:
    """Prints the tables of `transformers-radio plan`; raises what training would raise before its first step.

    One step of every group runs on tensors without memory, so that shapes that do not fit are found here. Nothing is
    downloaded: teachers that are not on the disk have the shapes of their released architecture.

    Args:
        gpu: a name of `gpus.GPUS`, for time and memory on these; one process each.
        utilisation: the share of their peak FLOP/s that the arithmetic reaches.

    Raises:
        ValueError: recipe, teachers and number of processes do not fit together; an unknown GPU.
    """
    recipe = expand_paths(recipe)
    validate(recipe)  # it may have been made or changed in Python
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected 1 or more")
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation is {utilisation}; expected a share above 0 and at most 1")
    if gpu is not None:
        find_gpu(gpu)
    # These GPUs have bfloat16 units; without `gpu`, the plan is for this machine.
    device = torch.device("cuda" if gpu is not None or torch.cuda.is_available() else "cpu")
    recipe = resolve_precision(recipe, device)
    warn_of_slow_precision(recipe, device)
    groups = {
        name: stage_groups(name, stage, list(recipe.teachers), world_size=processes)
        for name, stage in recipe.stages.items()
    }
    recipe.data.validate()
    sharding_ranks(recipe, groups)
    teachers = {name: describe_teacher(name, spec) for name, spec in recipe.teachers.items()}
    student = describe_student(recipe, teachers)
    check_layout(recipe, student, teachers, groups)
    teacher_costs = {name: _cost_of_teacher(name, teacher) for name, teacher in teachers.items()}
    outputs = {name: cost.output for name, cost in teacher_costs.items()}
    steps = {stage: run_stage(recipe, stage, of_stage, student, outputs) for stage, of_stage in groups.items()}

    # A pipe has no width, and with the usual 80 columns the headers would be cut.
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False, emoji=False)
    console.print(_teachers_table(recipe, teachers, teacher_costs))
    heads = sum(parameter.numel() for parameter in student.adaptors.parameters()) / 1e6
    config = student.config
    console.print(
        f"student: {_millions(student) - heads:.2f} M parameters + {heads:.2f} M in the heads; width "
        f"{config.hidden_size}, {config.num_hidden_layers} layers, patch {config.patch_size}, "
        f"{config.num_cls_tokens} CLS tokens, {config.num_registers} registers"
    )
    console.print(_stages_table(recipe, groups, student, steps, teacher_costs))
    seen = sum(_samples(recipe.stages[name], group) for name in groups for group in groups[name])
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    console.print(
        f"samples seen: {seen:,}; weights, gradients, AdamW's moments: {4 * weights / 1e6:,.1f} MB a process"
    )
    if gpu is not None:
        loads = {
            name: stage_loads(recipe, name, groups, processes, student.config, steps[name], teachers, teacher_costs)
            for name in recipe.stages
        }
        _print_cluster(console, recipe, loads, processes, gpu, utilisation)
    for note in _notes(recipe, groups, student, processes):
        console.print(f"note: {note}")


def describe_teacher(name: str, spec: TeacherRecipe) -> Teacher:
    """A teacher of a recipe on the meta device.

    Raises:
        ValueError: it could not be loaded from the disk, or is neither there nor known; the message names it.
    """
    if is_on_disk(spec.type, spec.checkpoint):
        return load_teacher(name, spec).to("meta")
    try:
        return known_teacher(spec.type, spec.checkpoint, spec.image_size, spec.dtype, **spec.options)
    except Exception as error:
        raise ValueError(f"teachers.{name} ({spec.type}): {error}") from error


def _cost_of_teacher(name: str, teacher: Teacher) -> TeacherCost:
    try:
        return run_teacher(teacher)
    except RuntimeError as error:
        raise ValueError(
            f"teachers.{name} cannot compute with image_size={teacher.image_size}: {one_line(error)}"
        ) from error


def describe_student(recipe: Recipe, teachers: dict[str, Teacher]) -> RadioModel:
    """The student with the heads of all stages, on the meta device.

    Raises:
        ValueError: its checkpoint is not on the disk.
    """
    shapes = {name: TeacherShape.of(teacher) for name, teacher in teachers.items()}
    checkpoint = recipe.student.checkpoint
    if checkpoint is None:
        with torch.device("meta"):
            return build_student(recipe, shapes)
    if not Path(checkpoint).is_dir():
        raise ValueError(f"student.checkpoint {checkpoint} is not on the disk; download it and give its folder")
    return build_student(recipe, shapes).to("meta")


def _teachers_table(recipe: Recipe, teachers: dict[str, Teacher], costs: dict[str, TeacherCost]) -> Table:
    table = _table(
        "teachers (frozen)", 2, "name", "type", "image size", "grid", "summary", "features", "params (M)",
        "weights MB", "GFLOPs/image",
    )  # fmt: skip
    for name, teacher in teachers.items():
        size = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
        h, w = costs[name].output.grid
        table.add_row(
            name,
            recipe.teachers[name].type,
            str(teacher.image_size),
            f"{h}x{w}",
            str(teacher.summary_dim or "-"),
            str(teacher.feature_dim),
            f"{_millions(teacher):.2f}",
            f"{size / 1e6:,.1f}",
            f"{costs[name].flops / 1e9:.2f}",
        )
    return table


def _stages_table(
    recipe: Recipe,
    groups: dict[str, list[Group]],
    student: RadioModel,
    steps: dict[str, dict[str, StepCost]],
    teacher_costs: dict[str, TeacherCost],
) -> Table:
    table = _table(
        "stages (GFLOPs of one image)", 3, "stage", "group", "teachers", "resolution\n(grid)", "steps", "batch",
        "micro x passes\nx processes", "samples seen", "student\nGFLOPs", "teachers\nGFLOPs", "activations\nMB/pass",
    )  # fmt: skip
    for name, stage in recipe.stages.items():
        for group in groups[name]:
            grid = group.resolution // student.patch_size
            cost = steps[name][group.name]
            table.add_row(
                name,
                group.name,
                ", ".join(group.teachers),
                f"{group.resolution} ({grid}x{grid})",
                f"{stage.steps:,}" + (f" x {group.rate:g}" if group.rate < 1 else ""),
                f"{group.batch_size:,}",
                f"{group.micro_batch_size} x {group.passes} x {len(group.ranks)}",
                f"{_samples(stage, group):,}",
                f"{cost.flops / 1e9:.2f}",
                f"{sum(teacher_costs[teacher].flops for teacher in group.teachers) / 1e9:.2f}",
                f"{cost.activation_bytes / 1e6:,.1f}",
            )
    return table


def _print_cluster(
    console: Console, recipe: Recipe, loads: dict[str, list[Load]], processes: int, name: str, utilisation: float
) -> None:
    gpu = find_gpu(name)
    memory = _table(
        f"memory on {processes} x {name} ({gpu.memory_gb:g} GB), GB a process", 2, "stage", "processes", "states",
        "activations", "teachers", "all with DDP", "all with FSDP2",
    )  # fmt: skip
    peak = f"{gpu.half_tflops:g} TFLOP/s (float32: {gpu.float32_tflops:g})"
    speed = _table(
        f"time of a process at {utilisation:.0%} of {peak}", 3, "stage", "processes", "group", "images/step",
        "TFLOPs/step", "s/step", "busy", "images/s",
    )  # fmt: skip
    warnings, summary, total = [], [], 0.0
    for stage, stage_loads_ in loads.items():
        steps = recipe.stages[stage].steps
        time = stage_time(stage_loads_, steps, gpu, utilisation)
        for load in stage_loads_:
            ranks = _ranges(load.ranks)
            sizes = {engine: load.memory(processes, engine == "FSDP2") / 1e9 for engine in ("DDP", "FSDP2")}
            memory.add_row(
                stage,
                ranks,
                f"{load.state_bytes / 1e9:.1f}",
                f"{load.activation_bytes / 1e9:.1f}",
                f"{load.teacher_bytes / 1e9:.1f}",
                *(f"{size:.1f}" for size in sizes.values()),
            )
            full = [engine for engine, size in sizes.items() if size > gpu.memory_gb]
            if full:
                warnings.append(
                    f"stages.{stage} does not fit on processes {ranks} with {' or '.join(full)}: lower "
                    "micro_batch_size, set student.gradient_checkpointing, or teachers.NAME.placement to sharded or "
                    "offloaded"
                )
            for group in load.groups:
                images = group.passes * group.micro_batch_size
                flops = load.half_flops[group.name] + load.float32_flops[group.name]
                speed.add_row(
                    stage,
                    ranks,
                    group.name,
                    str(images),
                    f"{flops / 1e12:.1f}",
                    f"{load.group_seconds(group.name, gpu, utilisation):.2f}",
                    f"{time.busy[load.ranks]:.0%}",
                    f"{images * _turns(recipe.stages[stage], group) / steps / time.seconds:.1f}",
                )
        hours = steps * time.seconds / 3600
        total += hours * processes
        summary.append(
            f"{stage}: {1 / time.seconds:.2f} steps/s, bound by {' + '.join(time.bound_by)}; {hours:,.1f} hours, "
            f"{hours * processes:,.0f} GPU-hours"
        )
    console.print(memory)
    console.print(speed)
    for line in [*summary, f"total: {total:,.0f} GPU-hours", *(f"warning: {warning}" for warning in warnings)]:
        console.print(line)


def _notes(recipe: Recipe, groups: dict[str, list[Group]], student: RadioModel, processes: int) -> list[str]:
    notes = []
    for name, stage in recipe.stages.items():
        if not stage.groups:
            continue
        images = {group.name: group.batch_size * _turns(stage, group) / stage.steps for group in groups[name]}
        parts = " + ".join(f"{key} {value:,.6g}" for key, value in images.items())
        notes.append(f"stages.{name}: {parts} = {sum(images.values()):,.6g} images a step on average")
        shares = {key: group.share for key, group in stage.groups.items()}
        if processes < len(shares):
            notes.append(f"stages.{name}: its {len(shares)} groups run in turn, for want of processes")
        elif uneven_shares(groups[name], shares, processes):
            counts = " : ".join(str(len(group.ranks)) for group in groups[name])
            wanted = " : ".join(f"{share:g}" for share in shares.values())
            notes.append(f"stages.{name}: its groups have {counts} processes, for shares of {wanted}")
    for size, sides in unused_windows(student, groups).items():
        notes.append(f"student.config.train_window_sizes: {size} is never drawn, as the grids have sides of {sides}")
    try:
        check_writable(Path(recipe.output_dir), "output_dir")
        check_disk(recipe, student)
    except OSError as error:  # of this machine; the run may have another disk
        notes.append(str(error))
    return notes


def _table(title: str, left: int, *columns: str) -> Table:
    """The first `left` columns hold text, the others numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right")
    return table


def _ranges(ranks: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5"."""
    starts = [0, *(i + 1 for i, (left, right) in enumerate(pairwise(ranks)) if right != left + 1), len(ranks)]
    runs = [ranks[start:end] for start, end in pairwise(starts)]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _turns(stage: StageRecipe, group: Group) -> int:
    """The steps of the stage in which the group takes part."""
    return group.turns_before(stage.steps)


def _samples(stage: StageRecipe, group: Group) -> int:
    return group.batch_size * _turns(stage, group)


def _millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
