"""What a plan knows: teachers and student without memory, the groups of every stage, and what their steps cost."""

from dataclasses import dataclass
from pathlib import Path

import torch

from transformers_radio.data import one_line
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher
from transformers_radio.teachers.known import is_on_disk, known_teacher
from transformers_radio.training.checks import check_layout
from transformers_radio.training.groups import Group, stage_groups
from transformers_radio.training.recipe import Recipe, TeacherRecipe, expand_paths, validate
from transformers_radio.training.run.processes import resolve_precision, warn_of_slow_precision
from transformers_radio.training.student import TeacherShape, build_student
from transformers_radio.training.teachers import load_teacher, sharding_ranks

from .dry_run import StepCost, TeacherCost, run_stage, run_teacher


@dataclass(frozen=True)
class Plan:
    """A recipe on a number of processes.

    Attributes:
        groups: stage -> its groups.
        teachers, student: on the meta device; the student has the heads of all stages.
        teacher_costs: teacher -> the cost of one image.
        steps: stage -> group -> the cost of one pass.
    """

    recipe: Recipe
    processes: int
    groups: dict[str, list[Group]]
    teachers: dict[str, Teacher]
    student: RadioModel
    teacher_costs: dict[str, TeacherCost]
    steps: dict[str, dict[str, StepCost]]


def make_plan(recipe: Recipe, processes: int, device: torch.device) -> Plan:
    """Checks a recipe as training does before its first step, and counts one step of every group.

    Args and errors as in `check_recipe`.
    """
    recipe, groups, teachers, student = check_recipe(recipe, processes, device)
    teacher_costs = {name: _cost_of_teacher(name, teacher) for name, teacher in teachers.items()}
    outputs = {name: cost.output for name, cost in teacher_costs.items()}
    steps = {stage: run_stage(recipe, stage, of_stage, student, outputs) for stage, of_stage in groups.items()}
    return Plan(recipe, processes, groups, teachers, student, teacher_costs, steps)


def check_recipe(
    recipe: Recipe, processes: int, device: torch.device
) -> tuple[Recipe, dict[str, list[Group]], dict[str, Teacher], RadioModel]:
    """Checks a recipe as training does before its first step, but for its images and the folders of its run.

    Args:
        device: what `auto` precisions are resolved for; nothing is computed on it.

    Returns:
        The recipe with its paths and precisions settled, and groups, teachers and student as in `Plan`.

    Raises:
        ValueError: recipe, teachers and number of processes do not fit together.
    """
    recipe = expand_paths(recipe)
    validate(recipe)  # it may have been made or changed in Python
    if processes < 1:
        raise ValueError(f"processes is {processes}; expected 1 or more")
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
    return recipe, groups, teachers, student


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


def _cost_of_teacher(name: str, teacher: Teacher) -> TeacherCost:
    try:
        return run_teacher(teacher)
    except RuntimeError as error:
        raise ValueError(
            f"teachers.{name} cannot compute with image_size={teacher.image_size}: {one_line(error)}"
        ) from error
