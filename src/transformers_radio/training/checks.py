"""What can fail is tried before the first step: batch arithmetic, data, disk, shapes of every teacher and head."""

import shutil
from pathlib import Path

import torch
from accelerate import Accelerator

from transformers_radio.data import ImageStream
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher

from .distill import distillation_losses, raise_if_not_finite, teacher_targets
from .recipe import Recipe, micro_batch
from .run_folder import find_checkpoints


def check_before_training(
    recipe: Recipe, student: RadioModel, teachers: dict[str, Teacher], accelerator: Accelerator
) -> None:
    """Raises ValueError or OSError with the field and the fix, or returns with the student unchanged."""
    check_resolutions(recipe, student)
    check_shapes(recipe, student.to(accelerator.device), teachers)
    check_disk(recipe, student)
    for stage in recipe.stages.values():
        images_per_pass, _ = micro_batch(stage, accelerator.num_processes)
        sides = (teachers[name].image_size for name in stage.teachers or teachers)
        ImageStream(
            recipe.data,
            resolutions=sorted({stage.resolution, *sides}),
            batch_size=images_per_pass,
            seed=recipe.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        ).check()


def check_resolutions(recipe: Recipe, student: RadioModel) -> None:
    for name, stage in recipe.stages.items():
        if stage.resolution % student.min_resolution_step or stage.resolution > student.max_resolution:
            nearest = student.get_nearest_supported_resolution(stage.resolution, stage.resolution)[0]
            raise ValueError(
                f"stages.{name}.resolution is {stage.resolution}; the student takes multiples of "
                f"{student.min_resolution_step} up to {student.max_resolution}, the nearest is {nearest}"
            )


def check_shapes(recipe: Recipe, student: RadioModel, teachers: dict[str, Teacher]) -> None:
    """Runs one grey image through every teacher, the student and the losses of every stage."""
    training = student.training
    student.eval()
    for name, stage in recipe.stages.items():
        used = {teacher: teachers[teacher] for teacher in stage.teachers or teachers}
        sides = {stage.resolution, *(teacher.image_size for teacher in used.values())}
        images = {side: torch.full((1, 3, side, side), 0.5, device=student.device) for side in sides}
        targets = teacher_targets(used, images)
        for teacher, target in targets.items():
            summary_dim = None if target.summary is None else target.summary.shape[-1]
            found = (summary_dim, target.features.shape[-1], target.features.shape[1])
            h, w = target.grid
            promised = (used[teacher].summary_dim, used[teacher].feature_dim, h * w)
            if found != promised:
                raise ValueError(
                    f"teachers.{teacher} promises (summary_dim, feature_dim, h*w) = {promised} and returns {found}"
                )
        with torch.no_grad():
            output = student(images[stage.resolution], adaptors=list(used))
        side = stage.resolution // student.patch_size
        try:
            terms = distillation_losses(output, (side, side), targets, recipe.loss)
        except (RuntimeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"stages.{name}: the student's heads do not fit the teachers' outputs ({error}); a student from a "
                "checkpoint needs adaptors of the recipe's teachers with the same widths"
            ) from error
        raise_if_not_finite(terms, 0)
    student.train(training)


def check_disk(recipe: Recipe, student: RadioModel) -> None:
    """Weights twice and Adam's two moments, for each checkpoint kept and the one being written; the final student."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in student.parameters())
    present = 0 if recipe.overwrite else len(find_checkpoints(Path(recipe.output_dir)))
    needed = 4 * weights * (max(recipe.checkpoints.keep - present, 0) + 1) + weights
    folder = Path(recipe.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"output_dir {recipe.output_dir} has {free / 1e6:,.0f} MB free and the run needs {needed / 1e6:,.0f} MB "
            f"for {recipe.checkpoints.keep} + 1 checkpoints; lower checkpoints.keep or choose another output_dir"
        )
