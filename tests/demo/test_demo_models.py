"""What of a student's teachers is loaded, and what is said of the others."""

import sys

import pytest

from helpers.taught_student import CLIP, DINOV2, SAM, adaptor, save_taught_student
from transformers_radio.demo.models import load_models


def test_all_that_is_at_hand_is_loaded(models):
    assert models.left_out == {}
    assert {name: teacher.image_size for name, teacher in models.teachers.items()} == {
        "clip": 64,
        "dinov2": 84,
        "sam": 128,
    }
    assert models.student.adaptor == "clip" and models.text(["a cat"]).shape == (1, 128)
    assert len(models.sam.image_encoder.blocks) == 0  # the student takes their place


def test_a_teacher_is_shown_at_the_size_at_which_it_taught(tmp_path):
    folder = save_taught_student(tmp_path / "student", dinov2=adaptor(DINOV2, 192))
    (tmp_path / "student" / "teacher_manifest.json").write_text('{"dinov2": {"image_size": 42}}')
    assert load_models(folder).teachers["dinov2"].image_size == 42


def test_what_is_missing_is_said(tmp_path):
    folder = save_taught_student(
        tmp_path / "student",
        clip=adaptor("open_clip:local:mine", 128),
        dinov2=adaptor(DINOV2, 192, feature_dim=100),
        other=adaptor("local:unknown"),
    )
    models = load_models(folder)
    assert models.teachers == {} and models.text is None and models.sam is None
    told = models.left_out
    assert set(told) == {"clip", "dinov2", "other", "labels", "masks"}
    assert told["clip"].startswith("The teacher clip is left out: ") and "give its path on this one" in told["clip"]
    assert "are 192 wide, those of the adaptor 100" in told["dinov2"]
    assert "local:mine was on the machine that trained with it" in told["labels"]
    assert told["masks"].startswith("Masks are left out: none of the student's adaptors")
    assert all(one.endswith(".") and "\n" not in one for one in told.values())


def test_a_student_of_dense_teachers_alone_has_no_labels(tmp_path):
    models = load_models(save_taught_student(tmp_path / "student", dinov2=adaptor(DINOV2, 192)))
    assert "no adaptor to a teacher with a text tower (its adaptors: dinov2)" in models.left_out["labels"]
    assert models.student.adaptor is None and list(models.teachers) == ["dinov2"]


def test_a_given_teacher_takes_the_place_of_the_recorded_one(tmp_path):
    lost = {"clip": adaptor("open_clip:local:mine", 128), "masks": adaptor("segment_anything:local:sam.pth")}
    folder = save_taught_student(tmp_path / "student", **lost)
    models = load_models(folder, {"clip": CLIP, "masks": SAM}, with_teachers=False)
    assert models.left_out == {} and models.teachers == {}
    assert models.text is not None and models.sam_encoder.adaptor == "masks"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sam": SAM}, r"no adaptor 'sam'; it has clip"),
        ({"clip": "open_clip:/nowhere"}, "/nowhere"),
        ({"clip": DINOV2}, "no text tower"),
    ],
)
def test_a_given_teacher_that_does_not_fit_is_an_error(tmp_path, given, message):
    folder = save_taught_student(tmp_path / "student", clip=adaptor(CLIP, 128))
    with pytest.raises((ValueError, OSError), match=message):
        load_models(folder, given)


def test_a_strangers_student_runs_no_code_of_its_teacher(tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = save_taught_student(tmp_path / "student", other=adaptor("python:hostile:Teacher"))
    told = load_models(folder).left_out
    assert "whose code runs only if you name it, with --teacher other=python:hostile:Teacher" in told["other"]
    assert "hostile" not in sys.modules


def test_another_kind_of_model_is_refused():
    from importlib import resources

    with pytest.raises(ValueError, match="expected the folder of a student"):
        load_models(str(resources.files("transformers_radio.quickstart") / "teachers" / "dinov2"))
