"""A plan refuses what training refuses before its first step, and training refuses it before it takes its folder."""

import pytest

from transformers_radio.training import load_recipe, train
from transformers_radio.training.plan.tables import print_plan
from transformers_radio.training.recipe import StageRecipe

PHI_S = "loss.standardization=phi_s"
TWO_GROUPS = (
    "stages.main={resolution: 0, groups: {low: {teachers: [clip, sam], resolution: 32, batch_size: 4}, "
    "high: {teachers: [sam], resolution: 48, batch_size: 4}}}"
)


def refused_by_both(recipe, match, tmp_path):
    for attempt in (print_plan, train):
        with pytest.raises(ValueError, match=match):
            attempt(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [PHI_S, "teachers.sam.options.width=18"],
            "teachers.sam cannot be standardized.*no Hadamard matrix of size 18",
        ),
        # clip has 3 x 3 positions an image for 20 channels
        (
            [PHI_S, "teachers.clip.options.width=20", "loss.statistics_images=2"],
            r"statistics_images is 2.*at least 3,",
        ),
        # the grid has 4 x 4 patches
        (["student.config.train_window_sizes=[3, 4]"], r"train_window_sizes is \[3, 4\].*sides of \[4\]"),
        (["stages.main.resolution=36"], "the nearest is"),
        (["data.lanes=3", "data.num_workers=2"], "data.lanes is 3"),
        (["student.config.mlp_ratio=1e308"], "mlp_ratio"),
        (["student.config.num_channels=-1"], "num_channels"),
        (["student.config.hidden_act=nosuch"], "hidden_act"),
    ],
)
def test_what_needs_no_weights(overrides, message, make_recipe, tmp_path):
    refused_by_both(load_recipe(make_recipe(), overrides), message, tmp_path)


def test_just_enough_vectors_are_enough(make_recipe):
    """27 vectors for 20 channels."""
    enough = [PHI_S, "teachers.clip.options.width=20", "loss.statistics_images=3", "stages.main.steps=3"]
    recipe = load_recipe(make_recipe(), enough)
    print_plan(recipe)
    assert train(recipe).step == 3


def test_a_recipe_made_in_python_is_validated(make_recipe, tmp_path):
    recipe = load_recipe(make_recipe())
    recipe.stages = {"main": StageRecipe(steps=2, resolution=32, batch_size=4, teachers=["clip"])}
    refused_by_both(recipe, "teachers.sam teaches in no stage", tmp_path)
    recipe.stages["main"].teachers = ["clip", "sam", "typo"]
    refused_by_both(recipe, "stages.main.teachers is 'typo'; expected one of clip, sam", tmp_path)


def test_a_plan_refuses_a_sharded_teacher_that_different_processes_serve(make_recipe):
    recipe = load_recipe(make_recipe(), [TWO_GROUPS, "teachers.sam.placement=sharded"])
    print_plan(recipe)  # by one process
    with pytest.raises(ValueError, match=r"teachers.sam.placement is sharded.*\(0,\), \(1,\)"):
        print_plan(recipe, processes=2)


def test_a_plan_names_windows_that_are_never_drawn(make_recipe, capsys):
    print_plan(load_recipe(make_recipe(), ["student.config.train_window_sizes=[2, 3]"]))
    text = " ".join(capsys.readouterr().out.split())
    assert "train_window_sizes: 3 is never drawn, as the grids have sides of [4]" in text
    assert "2 is never drawn" not in text


def test_accumulation_by_accelerate_is_refused(make_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 8.*micro_batch_size"):
        train(load_recipe(make_recipe()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("later", ["stages.main.steps=3", "stages.new={steps: 3, resolution: 32}"])
def test_emptying_a_part_before_filling_it_is_refused(later, make_recipe):
    with pytest.raises(ValueError, match="'stages=null' does not empty stages before 'stages"):
        load_recipe(make_recipe(), ["stages=null", later])
