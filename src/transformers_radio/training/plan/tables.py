"""What a recipe will do, counted without running it: dims, resolutions, FLOPs, memory, samples; time on real GPUs."""

import sys
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from transformers_radio.disk import check_writable
from transformers_radio.training.checks import check_disk, settings_without_effect
from transformers_radio.training.groups import Group
from transformers_radio.training.recipe import Recipe, StageRecipe

from .cost import Load, StageTime, stage_loads, stage_time, uneven_shares
from .count import Plan, make_plan
from .gpus import GPU, find_gpu

# In characters: all tables fit.
PIPE_WIDTH = 240


def print_plan(recipe: Recipe, processes: int = 1, gpu: str | None = None, utilization: float = 0.4) -> None:
    """Prints the tables of `transformers-radio plan`; raises what training would raise before its first step.

    One step of every group runs on tensors without memory, so that shapes that do not fit are found here. Nothing is
    downloaded: teachers that are not on the disk have the shapes of their released architecture.

    Args:
        gpu: a name of `gpus.GPUS`, for time and memory on these; one process each.
        utilization: the share of their peak FLOP/s that the arithmetic reaches.

    Raises:
        ValueError: recipe, teachers and number of processes do not fit together; an unknown GPU.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization is {utilization}; expected a share above 0 and at most 1")
    if gpu is not None:
        find_gpu(gpu)
    # These GPUs have bfloat16 units; without `gpu`, the plan is for this machine.
    device = torch.device("cuda" if gpu is not None or torch.cuda.is_available() else "cpu")
    plan = make_plan(recipe, processes, device)
    # A pipe has no width, and with the usual 80 columns the headers would be cut.
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, markup=False, emoji=False)
    console.print(_teachers_table(plan))
    console.print(_student_line(plan))
    console.print(_stages_table(plan))
    console.print(_totals_line(plan))
    if gpu is not None:
        _print_cluster(console, plan, gpu, utilization)
    for note in _notes(plan):
        console.print(f"note: {note}")


def _teachers_table(plan: Plan) -> Table:
    columns = ["image size", "grid", "summary", "features", "params (M)", "weights MB", "GFLOPs/image"]
    table = _table("teachers (frozen)", ["name", "type"], columns)
    for name, teacher in plan.teachers.items():
        cost = plan.teacher_costs[name]
        h, w = cost.output.grid
        table.add_row(
            name,
            plan.recipe.teachers[name].type,
            str(teacher.image_size),
            f"{h}x{w}",
            str(teacher.summary_dim or "-"),
            str(teacher.feature_dim),
            f"{_millions(teacher):.2f}",
            f"{_megabytes(teacher):,.1f}",
            f"{cost.flops / 1e9:.2f}",
        )
    return table


def _student_line(plan: Plan) -> str:
    student, heads = plan.student, _millions(plan.student.adaptors)
    return (
        f"student ({student.config.model_type}): {_millions(student) - heads:.2f} M parameters + {heads:.2f} M in the "
        f"heads; {len(student.blocks)} blocks, summary {student.summary_dim} wide, features {student.feature_dim} wide"
    )


def _stages_table(plan: Plan) -> Table:
    columns = [
        "resolution\n(grid)",
        "steps",
        "batch",
        "micro x passes\nx processes",
        "samples seen",
        "student\nGFLOPs",
        "teachers\nGFLOPs",
        "activations\nMB/pass",
    ]
    table = _table("stages (GFLOPs of one image)", ["stage", "group", "teachers"], columns)
    for name, stage in plan.recipe.stages.items():
        for group in plan.groups[name]:
            h, w = plan.student.grid(group.resolution, group.resolution)
            cost = plan.steps[name][group.name]
            table.add_row(
                name,
                group.name,
                ", ".join(group.teachers),
                f"{group.resolution} ({h}x{w})",
                f"{stage.steps:,}" + (f" x {group.rate:g}" if group.rate < 1 else ""),
                f"{group.batch_size:,}",
                f"{group.micro_batch_size} x {group.passes} x {len(group.ranks)}",
                f"{_samples(stage, group):,}",
                f"{cost.flops / 1e9:.2f}",
                f"{sum(plan.teacher_costs[teacher].flops for teacher in group.teachers) / 1e9:.2f}",
                f"{cost.activation_bytes / 1e6:,.1f}",
            )
    return table


def _totals_line(plan: Plan) -> str:
    seen = sum(_samples(plan.recipe.stages[name], group) for name, groups in plan.groups.items() for group in groups)
    return (
        f"samples seen: {seen:,}; weights, gradients, AdamW's moments: {4 * _megabytes(plan.student):,.1f} MB per "
        "process"
    )


def _print_cluster(console: Console, plan: Plan, name: str, utilization: float) -> None:
    """Memory and time on GPUs of this name."""
    gpu, processes = find_gpu(name), plan.processes
    loads = {stage: stage_loads(plan, stage) for stage in plan.groups}
    times = {
        stage: stage_time(loads[stage], plan.recipe.stages[stage].steps, gpu, utilization) for stage in plan.groups
    }
    console.print(_memory_table(loads, processes, name))
    console.print(_speed_table(plan, loads, times, gpu, utilization))
    total = 0.0
    for stage, time in times.items():
        hours = plan.recipe.stages[stage].steps * time.seconds / 3600
        total += hours * processes
        console.print(
            f"{stage}: {1 / time.seconds:.2f} steps/s, bound by {' + '.join(time.bound_by)}; {hours:,.1f} hours, "
            f"{hours * processes:,.0f} GPU-hours"
        )
    console.print(f"total: {total:,.0f} GPU-hours")
    for stage, load in ((stage, load) for stage, of_stage in loads.items() for load in of_stage):
        full = [engine for engine, size in _memory(load, processes).items() if size > gpu.memory_gb]
        if full:
            console.print(
                f"warning: stages.{stage} does not fit on processes {_ranges(load.ranks)} with {' or '.join(full)}: "
                "lower micro_batch_size, set student.gradient_checkpointing, or teachers.NAME.placement to sharded or "
                "offloaded"
            )


def _memory(load: Load, processes: int) -> dict[str, float]:
    """Engine -> GB per process."""
    return {engine: load.memory(processes, fsdp=engine == "FSDP2") / 1e9 for engine in ("DDP", "FSDP2")}


def _memory_table(loads: dict[str, list[Load]], processes: int, name: str) -> Table:
    table = _table(
        f"memory on {processes} x {name} ({find_gpu(name).memory_gb:g} GB), GB per process",
        ["stage", "processes"],
        ["states", "activations", "teachers", "all with DDP", "all with FSDP2"],
    )
    for stage, load in ((stage, load) for stage, of_stage in loads.items() for load in of_stage):
        parts = (load.state_bytes / 1e9, load.activation_bytes / 1e9, load.teacher_bytes / 1e9)
        sizes = (*parts, *_memory(load, processes).values())
        table.add_row(stage, _ranges(load.ranks), *(f"{size:.1f}" for size in sizes))
    return table


def _speed_table(
    plan: Plan, loads: dict[str, list[Load]], times: dict[str, StageTime], gpu: GPU, utilization: float
) -> Table:
    peak = f"{gpu.half_tflops:g} TFLOP/s (float32: {gpu.float32_tflops:g})"
    columns = ["images/step", "TFLOPs/step", "s/step", "busy", "images/s"]
    table = _table(f"time of a process at {utilization:.0%} of {peak}", ["stage", "processes", "group"], columns)
    for stage, load in ((stage, load) for stage, of_stage in loads.items() for load in of_stage):
        recipe, time = plan.recipe.stages[stage], times[stage]
        for group in load.groups:
            images = group.passes * group.micro_batch_size
            flops = load.half_flops[group.name] + load.float32_flops[group.name]
            table.add_row(
                stage,
                _ranges(load.ranks),
                group.name,
                str(images),
                f"{flops / 1e12:.1f}",
                f"{load.group_seconds(group.name, gpu, utilization):.2f}",
                f"{time.busy[load.ranks]:.0%}",
                f"{images * _turns(recipe, group) / recipe.steps / time.seconds:.1f}",
            )
    return table


def _notes(plan: Plan) -> list[str]:
    """What a user should know before starting: uneven groups, settings without effect, a full disk."""
    notes = []
    for name, stage in plan.recipe.stages.items():
        if stage.groups:
            notes += _notes_on_groups(name, stage, plan.groups[name], plan.processes)
    notes += settings_without_effect(plan.student, plan.groups)
    try:
        check_writable(Path(plan.recipe.output_dir), "output_dir")
        check_disk(plan.recipe, plan.student)
    except OSError as error:  # only this machine's disk; the run may have another
        notes.append(str(error))
    return notes


def _notes_on_groups(name: str, stage: StageRecipe, groups: list[Group], processes: int) -> list[str]:
    images = {group.name: group.batch_size * _turns(stage, group) / stage.steps for group in groups}
    parts = " + ".join(f"{key} {value:,.6g}" for key, value in images.items())
    notes = [f"stages.{name}: {parts} = {sum(images.values()):,.6g} images per step on average"]
    shares = {key: group.share for key, group in stage.groups.items()}
    if processes < len(shares):
        notes.append(f"stages.{name}: its {len(shares)} groups run in turn, as there are fewer processes")
    elif uneven_shares(groups, shares, processes):
        counts = " : ".join(str(len(group.ranks)) for group in groups)
        wanted = " : ".join(f"{share:g}" for share in shares.values())
        notes.append(f"stages.{name}: its groups have {counts} processes, for shares of {wanted}")
    return notes


def _table(title: str, texts: list[str], numbers: list[str]) -> Table:
    """A table with columns of texts, aligned left, and columns of numbers, aligned right."""
    table = Table(title=title, title_justify="left")
    for column in texts:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
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
    """Images of the stage that the group sees, repetitions included."""
    return group.batch_size * _turns(stage, group)


def _millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _megabytes(module: torch.nn.Module) -> float:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters()) / 1e6
