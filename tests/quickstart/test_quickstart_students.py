"""`quickstart student=NAME`: three students of the same teachers and images."""

import pytest

from transformers_radio import RadioTimmConfig, RadioTimmModel
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.modeling import STUDENTS as STUDENT_TYPES
from transformers_radio.quickstart.run import DEFAULT, STUDENTS, _pictured_side, run_quickstart
from transformers_radio.training import load_recipe
from transformers_radio.training.recipe import recipe_to_dict, save_recipe


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


def test_a_student_that_cannot_be_built_is_named_before_images_are_drawn(tmp_path):
    for override, message in (
        ("student.size=huge", "there is no size 'huge'"),
        ("student.config.embed_dim=23", "embed_dim is 23, expected an even number"),
        ("student.config.embed_dims=24", "did you mean embed_dim"),
    ):
        with pytest.raises(ValueError, match=message):
            run_quickstart(tmp_path, [override])
    with pytest.raises(ValueError, match="has no network 'resnet0'"):
        run_quickstart(tmp_path, ["student=convnext", "student.size=resnet0", "student.config={}"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_student_is_named_before_images_are_drawn(tmp_path):
    before = load_recipe(STUDENTS["vit"][0], [f"output_dir={tmp_path / 'run'}"])
    (tmp_path / "run" / "student").mkdir(parents=True)
    save_recipe(before, tmp_path / "run" / "run.yaml")
    with pytest.raises(FileExistsError, match="run holds a run whose student is of type radio.*move that folder away"):
        run_quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_training_would_refuse_is_named_before_images_are_drawn(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").touch()
    for override, message in (
        ("stages.main.groups.low.micro_batch_size=7", "does not split into 1 processes x micro_batch_size 7"),
        ("stages.main.groups.low.resolution=100", "takes multiples of 32 up to 128"),
        (f"teachers.clip.checkpoint={tmp_path}/none", "none is not on the disk"),
        (f"student.checkpoint={tmp_path}/none", "none is not on the disk"),
        (f"output_dir={tmp_path}/file", "file is a file"),
        (f"output_dir={tmp_path}/photos", "is not empty and holds no run: it has mine.txt"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run_quickstart(tmp_path / "quickstart", [override])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


def test_images_of_the_user_that_are_not_there_are_named_before_images_are_drawn(tmp_path):
    with pytest.raises(FileNotFoundError, match="photos' does not exist"):
        run_quickstart(tmp_path, [f"data.path={tmp_path / 'photos'}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "image_size", "side"), [("convnext-2m", None, 256), ("swinv2-2m", 64, 64)])
def test_the_picture_shows_a_student_at_a_side_that_it_takes(size, image_size, side, tmp_path):
    RadioTimmModel(RadioTimmConfig.from_size(size, image_size=image_size)).save_pretrained(tmp_path)
    assert _pictured_side(load_encoder(str(tmp_path))) == side
