"""`max_aspect_ratio` of a group: the student's crops in many shapes, the teachers' as squares."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from transformers_radio.training import load_recipe, stage, train
from transformers_radio.training.groups import stage_groups
from transformers_radio.training.plan.tables import print_plan
from transformers_radio.training.recipe import GroupRecipe, StageRecipe

GROUPS = (
    "stages.main={resolution: 0, groups: {wide: {teachers: [clip], resolution: 32, batch_size: 4, "
    "max_aspect_ratio: RATIO}, high: {teachers: [sam], resolution: 32, batch_size: 2}}}"
)


def sizes_of(resolution, ratio, step):
    recipe = StageRecipe(steps=1, groups={"one": GroupRecipe(["a"], resolution, 4, max_aspect_ratio=ratio)})
    return stage_groups("main", recipe, ["a"])[0].input_sizes(step)


@pytest.mark.parametrize(("resolution", "ratio", "step"), [(96, 1.5, 32), (96, 1.49, 32), (432, 2, 16), (64, 16, 16)])
def test_the_sizes_are_all_that_the_ratio_allows(resolution, ratio, step):
    sides = range(step, resolution + step, step)
    allowed = {
        (height, width)
        for height in sides
        for width in sides
        if max(height, width) == resolution and max(height, width) <= ratio * min(height, width)
    }
    sizes = sizes_of(resolution, ratio, step)
    assert set(sizes) == allowed and len(sizes) == len(allowed) and sizes[0] == (resolution, resolution)


def test_a_ratio_of_one_leaves_the_square():
    assert sizes_of(96, 1, 32) == [(96, 96)]


def test_the_student_sees_the_teachers_crops_in_other_shapes(make_recipe, monkeypatch):
    """Every size is drawn, and the pixels are those of the square, resized as Pillow does it."""
    squares, seen, targets = [], [], []
    to_device = stage.to_device

    def record(batch, device):
        images = to_device(batch, device)
        squares.append(images[32])
        return images

    forward = stage.Distillation.forward

    def record_forward(self, pixel_values, given, **options):
        seen.append(pixel_values)
        targets.append({name: target.grid for name, target in given.items()})
        return forward(self, pixel_values, given, **options)

    monkeypatch.setattr(stage, "to_device", record)
    monkeypatch.setattr(stage.Distillation, "forward", record_forward)
    train(load_recipe(make_recipe(), [GROUPS.replace("RATIO", "2"), "stages.main.steps=30"]))
    wide, high = seen[::2], seen[1::2]
    assert {tuple(pixels.shape[2:]) for pixels in high} == {(32, 32)}
    shapes = [tuple(pixels.shape[2:]) for pixels in wide]
    assert set(shapes) == {(32, 32), (32, 24), (32, 16), (24, 32), (16, 32)}
    assert len({grids["clip"] for grids in targets[::2]}) == 1  # CLIP's input has not changed
    for pixels, square in zip(wide, squares[::2], strict=True):
        height, width = pixels.shape[2:]
        for plane, of_square in zip(pixels.flatten(0, 1), square.flatten(0, 1), strict=True):
            expected = Image.fromarray(of_square.numpy()).resize((width, height), Image.Resampling.BILINEAR)
            np.testing.assert_allclose(plane.numpy(), np.asarray(expected), rtol=0, atol=1e-5)


def test_a_run_that_is_cut_draws_the_same_shapes(make_recipe, tmp_path):
    overrides = [GROUPS.replace("RATIO", "2"), "stages.main.steps=8", "checkpoints={every_steps: 3, keep: 9}"]
    train(load_recipe(make_recipe("whole"), overrides))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "student")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step:08d}")
    train(load_recipe(make_recipe("cut"), overrides))
    whole, cut = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.parametrize(
    ("ratio", "message"),
    [("1.2", "leaves squares alone.*at least 1.334$"), ("0.5", r"expected a number in \[1, 16\]")],
)
def test_a_ratio_that_changes_nothing_is_refused(ratio, message, make_recipe):
    for attempt in (print_plan, train):
        with pytest.raises(ValueError, match=message):
            attempt(load_recipe(make_recipe(), [GROUPS.replace("RATIO", ratio)]))
    print_plan(load_recipe(make_recipe(), [GROUPS.replace("RATIO", "1.334")]))  # what the message asks for
