import pytest
from tiny_teachers import PatchTeacher

from transformers_radio.training import load_recipe
from transformers_radio.training.distill import TeacherShape, build_student
from transformers_radio.training.placement import load_teacher
from transformers_radio.training.plan import print_plan, student_cost, teacher_flops


def test_flops_are_those_counted_by_hand(make_recipe):
    recipe = load_recipe(make_recipe(), ["teachers.sam.feature_weight=1"])
    shapes = {name: TeacherShape.of(load_teacher(name, spec)) for name, spec in recipe.teachers.items()}
    student = build_student(recipe, shapes)
    width, mlp, layers, patches, tokens = 32, 64, 2, 16, 16 + 1 + 1
    linear = tokens * (4 * width * width + 2 * width * mlp)  # q, k, v, out; fc1, fc2
    attention = 2 * tokens * tokens * width
    hidden = 20  # the widest teacher
    clip = (1 + patches) * (width * hidden + hidden * 16)
    sam = patches * (width * hidden + hidden * 20)
    expected = 2 * (patches * 3 * 8 * 8 * width + layers * (linear + attention) + clip + sam)
    cost = student_cost(student, 32, ["clip", "sam"])
    assert cost.forward_flops == expected
    # Each product has two in the backward pass, but for the patch embedding, whose input needs no gradient.
    assert cost.backward_flops == pytest.approx(2 * expected, rel=0.15)
    assert cost.activation_bytes > 4 * layers * tokens * mlp
    assert teacher_flops(PatchTeacher("", image_size=24)) == 2 * 9 * 3 * 8 * 8 * 24


def test_the_plan_says_what_the_run_will_be(make_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    recipe = load_recipe(make_recipe(), ["stages.main.micro_batch_size=1"])
    print_plan(recipe, processes=2)
    text = capsys.readouterr().out
    for fact in (
        "clip",
        "24",
        "3x3",
        "sam",
        "48",
        "6x6",
        "1 x 2 x 2",
        "samples seen: 48",
        "1 CLS tokens, 1 registers",
    ):
        assert fact in text, (fact, text)
    assert not (tmp_path / "run").exists()


def test_the_plan_refuses_what_training_would_refuse(make_recipe):
    with pytest.raises(ValueError, match="make it a multiple of 3"):
        print_plan(load_recipe(make_recipe()), processes=3)
