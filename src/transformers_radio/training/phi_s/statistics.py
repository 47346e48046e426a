"""PHI-S statistics of the teachers' features, measured once a run and kept in output_dir/statistics.

A checkpoint knows the size and checksum of those that it was trained with. What differs from these is measured again,
on the same images, and has to come out the same.
"""

import logging
import os
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from transformers_radio.data import ImageStream
from transformers_radio.teachers import Teacher
from transformers_radio.training.groups import Group
from transformers_radio.training.recipe import Recipe
from transformers_radio.training.run.folder import size_and_checksum, writing
from transformers_radio.training.run.log import to_device
from transformers_radio.training.run.processes import on_main_process
from transformers_radio.training.student import TeacherShape

from .rotation import FeatureMoments, PhiS

logger = logging.getLogger(__name__)


def standardize_teachers(
    recipe: Recipe,
    accelerator: Accelerator,
    groups: list[Group],
    teachers: dict[str, Teacher],
    shapes: dict[str, TeacherShape],
    known: dict[str, list[int]] | None,
) -> tuple[dict[str, PhiS], dict[str, list[int]]]:
    """PHI-S of every teacher of the groups whose features are taught; empty when the recipe has no standardization.

    Every process gets all of them; those that serve a teacher look at `loss.statistics_images` together.

    Args:
        groups: of a stage and of those before it: heads that rest speak standardised features too, and every
            checkpoint folds all of them back.
        known: teacher -> [bytes, checksum] of the file that the run has been trained with so far; None when it goes on
            from a checkpoint of an older version, which does not say: every file that is there counts then.

    Returns:
        Teacher -> transform, and what `known` is from now on.

    Raises:
        ValueError: a file that the run has been trained with is damaged, and cannot be had again.
    """
    transforms: dict[str, PhiS] = {}
    now: dict[str, list[int]] = {}
    if recipe.loss.standardization == "none":
        return transforms, now
    folder = Path(recipe.output_dir) / "statistics"
    names = {name for group in groups for name in group.teachers if recipe.teachers[name].feature_weight > 0}
    for name in [name for name in recipe.teachers if name in names]:
        path = folder / f"{name}.safetensors"
        expected = None if known is None else known.get(name, [])
        found = on_main_process(accelerator, partial(size_and_checksum, path))
        if found is None or (expected is not None and found != expected):
            if expected:
                logger.warning("%s is damaged or missing; it is measured again", path)
            group = next(group for group in groups if name in group.teachers)
            moments = FeatureMoments(shapes[name].feature_dim, accelerator.device)
            if group.index is not None:
                _look(recipe, group, name, teachers[name], moments, accelerator)
            moments.all_reduce(lambda tensor: accelerator.reduce(tensor, "sum"))
            tensors = PhiS.from_moments(moments).to("cpu", torch.float32).to_tensors()
            found = on_main_process(accelerator, partial(_write, tensors, path))
            if expected and found != expected:
                raise ValueError(
                    f"{path} was damaged or missing, and what was measured again is not what the run has been trained "
                    "with (other devices, processes or data.num_workers?): restore the file, or set overwrite=true "
                    "(start over)"
                )
        transforms[name] = _read(path, shapes[name].feature_dim).to(accelerator.device)
        now[name] = found
    return transforms, now


def _write(tensors: dict[str, torch.Tensor], path: Path) -> list[int]:
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    found = size_and_checksum(path)
    assert found is not None
    return found


def _read(path: Path, channels: int) -> PhiS:
    try:
        transform = PhiS.from_tensors(load_file(path))
        whole = transform.mean.shape == (channels,) and transform.rotation.shape == (channels, channels)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or set overwrite=true (start over)") from error
    if not whole:
        raise ValueError(
            f"{path} has a mean of shape {tuple(transform.mean.shape)}, expected ({channels},), as the teacher has; "
            "restore it, or set overwrite=true (start over)"
        )
    return transform


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
