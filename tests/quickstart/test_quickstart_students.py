"""`quickstart student=NAME`: three students of the same teachers and images."""

import pytest

from transformers_radio.modeling import STUDENTS as STUDENT_TYPES
from transformers_radio.quickstart.run import DEFAULT, STUDENTS, run_quickstart
from transformers_radio.training import load_recipe
from transformers_radio.training.recipe import recipe_to_dict


@pytest.mark.parametrize("name", STUDENTS)
def test_the_recipes_differ_in_their_student_and_in_what_it_sees(name):
    path, run = STUDENTS[name]
    recipe, vit = recipe_to_dict(load_recipe(path)), recipe_to_dict(load_recipe(STUDENTS["vit"][0]))
    assert recipe.pop("output_dir") == f"runs/quickstart/{run}"
    assert recipe.pop("student")["type"] in STUDENT_TYPES
    ours, theirs = recipe.pop("stages")["main"], vit.pop("stages")["main"]
    images = [
        stage["steps"] * sum(group["batch_size"] for group in stage["groups"].values()) for stage in (ours, theirs)
    ]
    assert images[0] <= images[1]  # none learns longer than the ViT
    vit.pop("student"), vit.pop("output_dir")
    assert recipe["teachers"]["sam"].pop("feature_weight") >= vit["teachers"]["sam"].pop("feature_weight")
    assert recipe == vit


def test_the_default_student_learns_words_at_every_resolution():
    groups = load_recipe(STUDENTS[DEFAULT][0]).stages["main"].groups.values()
    assert {group.resolution for group in groups if "clip" in group.teachers} == {64, 96, 128}
    assert {group.resolution for group in groups if "sam" in group.teachers} == {128}


def test_a_student_that_the_quickstart_does_not_have_is_named(tmp_path):
    with pytest.raises(ValueError, match="student is 'resnet', expected one of eradio, vit, convnext"):
        run_quickstart(tmp_path, ["student=resnet"])
    with pytest.raises(ValueError, match="unknown recipe field student.sise"):
        run_quickstart(tmp_path, ["student=eradio", "student.sise=xt"])
    assert list(tmp_path.iterdir()) == []
