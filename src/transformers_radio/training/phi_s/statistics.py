"""PHI-S statistics of the teachers' features, measured once per run and kept in output_dir/statistics.

A checkpoint knows the size and checksum of the files that it was trained with. A file that differs is measured again,
on the same images, and has to come out the same.
"""

import logging
import math
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from transformers_radio.disk import replace_whole, writing
from transformers_radio.training.groups import Group
from transformers_radio.training.run.folder import size_and_checksum
from transformers_radio.training.run.processes import on_main_process
from transformers_radio.training.run.state import Run
from transformers_radio.training.streams import open_stream, to_device

from .rotation import FeatureMoments, PhiS

logger = logging.getLogger(__name__)


def standardize_teachers(run: Run, groups: list[Group]) -> tuple[dict[str, PhiS], dict[str, list[int]]]:
    """PHI-S of every teacher of the groups whose features are taught; empty when the recipe has no standardization.

    Every process gets all of them; those that serve a teacher measure `loss.statistics_images` images together.

    Args:
        run: `run.state.statistics` says which files the run was trained with so far. Where it is None, as in
            checkpoints of older versions, every file that is there counts.
        groups: of a stage and of those before it. Heads of absent teachers predict standardized features too, and
            every checkpoint folds all of them back.

    Returns:
        Teacher -> transform, and teacher -> [bytes, checksum] of its file, which `run.state.statistics` is to become.

    Raises:
        ValueError: a file that the run was trained with is damaged, and measuring again gives another one.
    """
    transforms: dict[str, PhiS] = {}
    now: dict[str, list[int]] = {}
    recipe, known = run.recipe, run.state.statistics
    if recipe.loss.standardization == "none":
        return transforms, now
    names = {name for group in groups for name in group.teachers if recipe.teachers[name].feature_weight > 0}
    for name in [name for name in recipe.teachers if name in names]:
        path = run.output_dir / "statistics" / f"{name}.safetensors"
        expected = None if known is None else known.get(name, [])
        found = on_main_process(run.accelerator, partial(size_and_checksum, path))
        if found is None or (expected is not None and found != expected):
            if expected:
                logger.warning("%s is damaged or missing; it is measured again", path)
            group = next(group for group in groups if name in group.teachers)
            tensors = _measure(run, group, name).to("cpu", torch.float32).to_tensors()
            found = on_main_process(run.accelerator, partial(_write, tensors, path))
            if expected and found != expected:
                raise ValueError(
                    f"{path} was damaged or missing, and what was measured again is not what the run has been trained "
                    "with (other devices, processes or data.num_workers?): restore the file, or set overwrite=true "
                    "(start over)"
                )
        transforms[name] = _read(path, run.shapes[name].feature_dim).to(run.accelerator.device)
        now[name] = found
    return transforms, now


def _measure(run: Run, group: Group, name: str) -> PhiS:
    """PHI-S of a teacher, from images of all processes of one of its groups. Called by every process."""
    moments = FeatureMoments(run.shapes[name].feature_dim, run.accelerator.device)
    if group.index is not None:
        _add_images(run, group, name, moments)
    moments.all_reduce(lambda tensor: run.accelerator.reduce(tensor, "sum"))
    return PhiS.from_moments(moments)


def _add_images(run: Run, group: Group, name: str, moments: FeatureMoments) -> None:
    """Adds the teacher's features for this process's share of the images."""
    teacher = run.teachers[name]
    images = math.ceil(run.recipe.loss.statistics_images / len(group.ranks))
    batch_size = min(group.micro_batch_size, images)
    stream = open_stream(run.recipe, group, [teacher.image_size], batch_size, seed=run.recipe.seed)
    batches = iter(stream)
    with tqdm(total=images, desc=f"statistics of {name}", unit="image", disable=group.index != 0) as progress:
        seen = 0
        while seen < images:
            batch = next(batches)
            moments.update(teacher(to_device(batch, run.accelerator.device)[teacher.image_size]).features)
            seen += len(batch.keys)
            progress.update(len(batch.keys))
    stream.close()


def _write(tensors: dict[str, torch.Tensor], path: Path) -> list[int]:
    with writing(path, also=(SafetensorError,)), replace_whole(path) as temporary:
        save_file(tensors, temporary)
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
