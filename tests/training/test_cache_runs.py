"""Whole runs with a cache of the teachers' outputs: killed, repeated by a second student, by two processes."""

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny_teachers
from helpers.forked import finish, fork_group
from transformers_radio.training import load_recipe, train

TWO_GROUPS = (
    "stages.main={resolution: 0, groups: {low: {teachers: [clip], resolution: 32, batch_size: 4}, "
    "high: {teachers: [clip, sam], resolution: 64, batch_size: 4, rate: 0.5}}}"
)


def options(folder, *more):
    return ["data.frozen_crops=true", f"teacher_cache={folder}", "stages.main.steps=20", *more]


def assert_same(run, other):
    left, right = (load_file(folder / "student" / "model.safetensors") for folder in (run, other))
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.fixture
def encoded(monkeypatch):
    """Images that went through a teacher in this process, by the teacher's side."""
    seen = {24: 0, 48: 0}
    encode = tiny_teachers.PatchTeacher.encode

    def count(self, pixels):
        seen[self.image_size] += len(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(tiny_teachers.PatchTeacher, "encode", count)
    return seen


def test_each_image_is_encoded_once_also_for_a_second_student(make_recipe, encoded, tmp_path):
    train(load_recipe(make_recipe("first"), options(tmp_path / "cache")))
    assert encoded == {24: 25, 48: 25}  # 24 images in 3 epochs, and the one of the check before the start
    train(load_recipe(make_recipe("second"), options(tmp_path / "cache")))
    assert encoded == {24: 26, 48: 26}
    assert_same(tmp_path / "first", tmp_path / "second")
    # Without the cache the targets are not rounded to bfloat16.
    train(load_recipe(make_recipe("without"), ["data.frozen_crops=true", "stages.main.steps=20"]))
    left, right = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("first", "without"))
    difference = max((left[key] - right[key]).abs().max().item() for key in left)
    assert 0 < difference < 5e-3


def test_a_killed_run_ends_with_the_same_bits(make_recipe, start_training, tmp_path):
    train(load_recipe(make_recipe("undisturbed"), options(tmp_path / "cache")))
    wishes = options(tmp_path / "another")
    for step in (3, 12):
        process = start_training(make_recipe("killed"), *wishes)
        while not (tmp_path / "killed" / "checkpoints" / f"step-{step:08d}").exists() and process.poll() is None:
            pass
        process.kill()
        process.communicate()
    train(load_recipe(make_recipe("killed"), wishes))
    assert_same(tmp_path / "undisturbed", tmp_path / "killed")


def test_two_processes_and_two_groups_share_a_cache(make_recipe, tmp_path):
    for name in ("first", "second"):  # the second reads what the first has written
        finish(fork_group(2, make_recipe(name), *options(tmp_path / "cache", TWO_GROUPS)))
    assert_same(tmp_path / "first", tmp_path / "second")


def test_a_cache_of_something_else_or_without_frozen_crops_is_refused(make_recipe, tmp_path):
    train(load_recipe(make_recipe("first"), options(tmp_path / "cache")))
    with pytest.raises(ValueError, match=r"options.width \(16 there, 18 here\)"):
        train(load_recipe(make_recipe("other"), options(tmp_path / "cache", "teachers.clip.options.width=18")))
    with pytest.raises(ValueError, match="data.frozen_crops"):
        load_recipe(make_recipe("other"), [f"teacher_cache={tmp_path / 'cache'}"])
    assert not (tmp_path / "other").exists()
