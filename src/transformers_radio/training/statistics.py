"""PHI-S statistics of the teachers' features, measured once a run and kept in output_dir/statistics."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from transformers_radio.data import ImageStream
from transformers_radio.teachers import Teacher

from .distill import TeacherShape
from .partition import Group
from .phi_s import FeatureMoments, PhiS
from .progress import to_device
from .recipe import Recipe


def standardize_teachers(
    recipe: Recipe,
    accelerator: Accelerator,
    groups: list[Group],
    teachers: dict[str, Teacher],
    shapes: dict[str, TeacherShape],
) -> dict[str, PhiS]:
    """PHI-S of every teacher of the groups whose features are taught; empty when the recipe has no standardization.

    Every process gets all of them; those that serve a teacher look at `loss.statistics_images` together.

    Args:
        groups: of a stage and of those before it: heads that rest speak standardised features too, and every
            checkpoint folds all of them back.
    """
    transforms: dict[str, PhiS] = {}
    if recipe.loss.standardization == "none":
        return transforms
    folder = Path(recipe.output_dir) / "statistics"
    names = {name for group in groups for name in group.teachers if recipe.teachers[name].feature_weight > 0}
    for name in [name for name in recipe.teachers if name in names]:
        path = folder / f"{name}.safetensors"
        known = torch.tensor(int(path.exists()), device=accelerator.device)
        if int(accelerator.reduce(known, "sum")) < accelerator.num_processes:
            group = next(group for group in groups if name in group.teachers)
            moments = FeatureMoments(shapes[name].feature_dim, accelerator.device)
            if group.index is not None:
                _look(recipe, group, name, teachers[name], moments, accelerator)
            moments.all_reduce(lambda tensor: accelerator.reduce(tensor, "sum"))
            if accelerator.is_main_process:
                folder.mkdir(exist_ok=True)
                tensors = PhiS.from_moments(moments).to("cpu", torch.float32).to_tensors()
                save_file(tensors, path.with_suffix(".tmp"))
                os.replace(path.with_suffix(".tmp"), path)
            accelerator.wait_for_everyone()
        transforms[name] = PhiS.from_tensors(load_file(path)).to(accelerator.device)
    return transforms


def _look(
    recipe: Recipe, group: Group, name: str, teacher: Teacher, moments: FeatureMoments, accelerator: Accelerator
) -> None:
    images = -(-recipe.loss.statistics_images // len(group.ranks))  # of this process
    stream = ImageStream(
        recipe.data,
        [teacher.image_size],
        batch_size=min(group.micro_batch_size, images),
        seed=recipe.seed,
        rank=group.index or 0,
        world_size=len(group.ranks),
    )
    batches = iter(stream)
    with tqdm(total=images, desc=f"statistics of {name}", unit="image", disable=group.index != 0) as progress:
        seen = 0
        while seen < images:
            batch = next(batches)
            moments.update(teacher(to_device(batch, accelerator.device)[teacher.image_size]).features)
            seen += len(batch.keys)
            progress.update(len(batch.keys))
    stream.close()
