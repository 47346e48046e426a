"""Whatever can fail is tried before the first step: batch sizes, data, disk, shapes of every teacher and head."""

import math
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from transformers_radio.data import one_line
from transformers_radio.disk import existing
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher
from transformers_radio.training.phi_s.hadamard import hadamard
from transformers_radio.training.run.folder import find_checkpoints
from transformers_radio.training.run.log import raise_if_not_finite

from .distill import build_distillation, distillation_losses, teacher_targets
from .groups import Group
from .losses import loss_terms
from .optimizer import build_optimizer
from .recipe import Recipe
from .streams import open_stream


def check_before_training(
    recipe: Recipe,
    student: RadioModel,
    teachers: dict[str, Teacher],
    groups: dict[str, list[Group]],
    accelerator: Accelerator,
) -> None:
    """Raises ValueError or OSError with the field and the fix, or returns with the student unchanged.

    Args:
        student: with the heads of all stages.
        teachers: the teachers that this process serves.
        groups: stage -> its groups.
    """
    check_layout(recipe, student, teachers, groups)
    for stage, stage_groups in groups.items():
        for group in (group for group in stage_groups if group.index is not None):
            check_shapes(recipe, stage, group, student.to(accelerator.device), teachers)
            open_stream(recipe, group, group.sides(teachers)).check()
    for stage in recipe.stages:
        try:  # attention, reparametrization, noise, balancing, optimizer; nothing built here is kept
            build_optimizer(build_distillation(recipe, stage, student), recipe, recipe.stages[stage])
        except (ImportError, ValueError) as error:
            raise ValueError(f"stages.{stage} cannot be built: {error}") from error
    student.to("cpu")  # each stage moves its own part to the device, where FSDP2 shards it
    check_disk(recipe, student)


def check_layout(
    recipe: Recipe, student: RadioModel, teachers: dict[str, Teacher], groups: dict[str, list[Group]]
) -> None:
    """The checks that need shapes only, so that models may be on the meta device: `plan` makes them too."""
    check_resolutions(student, groups)
    check_lanes(recipe, groups)
    settings_without_effect(student, groups)
    check_standardization(recipe, student, teachers)


def check_resolutions(student: RadioModel, groups: dict[str, list[Group]]) -> None:
    for stage_groups in groups.values():
        for group in stage_groups:
            side = group.resolution
            if side % student.min_resolution_step or side > student.max_resolution:
                step = student.min_resolution_step
                if getattr(student.config, "image_size", None) == step == student.max_resolution:
                    raise ValueError(
                        f"{group.where}.resolution is {side}; the student is built for images of {step} pixels alone: "
                        f"set student.config.image_size={side}, or the resolution to {step}"
                    )
                nearest = min(
                    student.get_nearest_supported_resolution(side, side)[0], student.max_resolution // step * step
                )
                raise ValueError(
                    f"{group.where}.resolution is {side}; the student takes multiples of {step} up "
                    f"to {student.max_resolution}, the nearest is {nearest}"
                )
            step = student.min_resolution_step
            if group.max_aspect_ratio > 1 and len(group.input_sizes(step)) == 1:
                # rounded up, so that the number itself is enough
                least = math.ceil(1000 * side / (side - step)) / 1000 if side > step else None
                fix = f"at least {least:g}" if least else "1"
                raise ValueError(
                    f"{group.where}.max_aspect_ratio is {group.max_aspect_ratio:g}, which leaves squares alone: the "
                    f"student's sides are multiples of {step} pixels, and the longer one has {side}; set it to {fix}"
                )


def check_lanes(recipe: Recipe, groups: dict[str, list[Group]]) -> None:
    """A group's readers divide its lanes evenly in every stage: later stages continue the lanes of the first."""
    lanes: dict[str, int] = {}
    for stage, stage_groups in groups.items():
        for group in stage_groups:
            readers = len(group.ranks) * max(1, recipe.data.num_workers)
            of_group = lanes.setdefault(group.name, recipe.data.lanes or readers)
            if of_group % readers:
                raise ValueError(
                    f"data.lanes is {recipe.data.lanes}, which gives group {group.name} {of_group} lanes; in "
                    f"stages.{stage} it has {len(group.ranks)} processes x {max(1, recipe.data.num_workers)} "
                    f"data.num_workers = {readers} readers: set data.lanes to a multiple of all groups' readers"
                )


def settings_without_effect(student: RadioModel, groups: dict[str, list[Group]]) -> list[str]:
    """What the student's configuration asks for and no image of the run will get: one line each, for a note.

    Raises:
        ValueError: a field has no effect at all.
    """
    step = student.min_resolution_step
    sizes = {size for of_stage in groups.values() for group in of_stage for size in group.input_sizes(step)}
    try:
        return [f"student.config.{line}" for line in student.training_warnings(sorted(sizes))]
    except ValueError as error:
        raise ValueError(f"student.config.{error}") from error


def check_standardization(recipe: Recipe, student: RadioModel, teachers: dict[str, Teacher]) -> None:
    """PHI-S has a rotation for the width of every head of features, and enough vectors to find it."""
    if recipe.loss.standardization != "phi_s":
        return
    for name in recipe.teachers:
        channels = student.config.adaptors[name]["feature_dim"]
        if channels is None:
            continue
        try:
            hadamard(channels)
        except ValueError as error:
            raise ValueError(f"teachers.{name} cannot be standardized with phi_s: {error}") from error
        if name not in teachers:  # another process serves it
            continue
        positions = (teachers[name].image_size // teachers[name].patch_size) ** 2
        if recipe.loss.statistics_images * positions <= channels:
            raise ValueError(
                f"loss.statistics_images is {recipe.loss.statistics_images}: with {positions} positions per image of "
                f"teachers.{name} they give too few vectors for the covariance of its {channels} channels; set at "
                f"least {channels // positions + 1}, better a few hundred times as many"
            )


@torch.no_grad()
def check_shapes(recipe: Recipe, stage: str, group: Group, student: RadioModel, teachers: dict[str, Teacher]) -> None:
    """Runs one gray image through a group's teachers, the student and the losses."""
    used = {name: teachers[name] for name in group.teachers}
    images = {side: torch.full((1, 3, side, side), 0.5, device=student.device) for side in group.sides(used)}
    try:
        targets = teacher_targets(used, images)
    except RuntimeError as error:
        sizes = ", ".join(f"teachers.{name}.image_size={teacher.image_size}" for name, teacher in used.items())
        raise ValueError(f"{group.where}: a teacher cannot compute ({one_line(error)}); look at {sizes}") from error
    for name, target in targets.items():
        summary_dim = None if target.summary is None else target.summary.shape[-1]
        found = (summary_dim, target.features.shape[-1], target.features.shape[1])
        h, w = target.grid
        promised = (used[name].summary_dim, used[name].feature_dim, h * w)
        if found != promised:
            raise ValueError(
                f"teachers.{name} promises (summary_dim, feature_dim, h*w) = {promised} and returns {found}"
            )
    training = student.training
    output = student.eval()(images[group.resolution], adaptors=list(used))
    student.train(training)
    try:
        losses = distillation_losses(output, targets, loss_terms(recipe, stage, student), recipe.loss)
    except (RuntimeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{group.where}: the student's heads do not fit the teachers' outputs ({error}); a student from a "
            "checkpoint needs adaptors of the recipe's teachers with the same widths"
        ) from error
    raise_if_not_finite({str(term): values.mean().item() for term, values in losses.items()}, 0)


def checkpoint_bytes(recipe: Recipe, student: RadioModel) -> int:
    """Bytes that the run will write: checkpoints that are kept, the one being written, and the finished student.

    A checkpoint has the weights twice, AdamW's two moments and the average. Those that exist already do not count.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    present = 0 if recipe.overwrite else len(find_checkpoints(Path(recipe.output_dir)))
    copies = 4 if recipe.ema_decay is None else 5
    return copies * weights * (max(recipe.checkpoints.keep - present, 0) + 1) + weights


def check_disk(recipe: Recipe, student: RadioModel) -> None:
    """Raises OSError when the checkpoints of the run do not fit on the disk."""
    needed = checkpoint_bytes(recipe, student)
    free = shutil.disk_usage(existing(Path(recipe.output_dir).absolute())).free
    if needed > free:
        raise OSError(
            f"output_dir {recipe.output_dir} has {free / 1e6:,.0f} MB free and the run needs {needed / 1e6:,.0f} MB "
            f"for {recipe.checkpoints.keep} + 1 checkpoints; lower checkpoints.keep or choose another output_dir"
        )
