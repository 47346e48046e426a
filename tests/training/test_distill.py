import pytest
import torch
from tiny_teachers import PatchTeacher
from torch.nn import functional as F

from transformers_radio.training import load_recipe
from transformers_radio.training.balancing import NaiveBalancing
from transformers_radio.training.distill import (
    Distillation,
    TeacherShape,
    distillation_losses,
    stage_student,
    teacher_targets,
    term_weights,
)
from transformers_radio.training.distill import build_student as build_student_of_shapes
from transformers_radio.training.placement import load_teacher


def build_teachers(recipe):
    return {name: load_teacher(name, spec) for name, spec in recipe.teachers.items()}


def build_student(recipe, teachers):
    return build_student_of_shapes(recipe, {name: TeacherShape.of(teacher) for name, teacher in teachers.items()})


def build_distillation(recipe, student):
    return Distillation(student, NaiveBalancing(term_weights(recipe, student)), recipe.loss)


def test_every_term_of_the_loss_is_that_of_the_equations(make_recipe):
    """Equations 1 to 3 and the larger grid, written out again with torch's own functions."""
    recipe = load_recipe(make_recipe(), ["teachers.clip.summary_weight=0.5", "teachers.sam.feature_weight=2"])
    teachers = build_teachers(recipe)
    student = build_student(recipe, teachers).eval()
    images = {side: torch.rand(3, 3, side, side) for side in (24, 32, 48)}
    output = student(images[32])
    terms = distillation_losses(output, (4, 4), teacher_targets(teachers, images), recipe.loss)
    assert set(terms) == {"clip/summary", "clip/features", "sam/features"}

    clip = teachers["clip"](images[24])
    summary = 1 - F.cosine_similarity(output.adaptors["clip"].summary, clip.summary)  # (B,)
    torch.testing.assert_close(terms["clip/summary"], summary)
    expected = {}
    for name, side, student_maps_grow in (("clip", 24, False), ("sam", 48, True)):
        target = teachers[name](images[side]).features.mT.unflatten(2, (side // 8, side // 8))
        found = output.adaptors[name].features.mT.unflatten(2, (4, 4))
        if student_maps_grow:
            found = F.interpolate(found, size=target.shape[2:], mode="bilinear")
        else:
            target = F.interpolate(target, size=(4, 4), mode="bilinear")
        cosine = (1 - F.cosine_similarity(found, target, dim=1)).mean(dim=(1, 2))
        smooth_l1 = F.smooth_l1_loss(found, target, beta=2.0, reduction="none").mean(dim=(1, 2, 3))
        expected[name] = 0.9 * cosine + 0.1 * smooth_l1
        torch.testing.assert_close(terms[f"{name}/features"], expected[name])
    total = 0.5 * summary + expected["clip"] + 2 * expected["sam"]
    found, _ = build_distillation(recipe, student)(images[32], teacher_targets(teachers, images))
    torch.testing.assert_close(found, total)


@pytest.mark.parametrize(("summary", "tokens", "width"), [("cls_per_teacher", 2, 64), ("cls", 1, 32), ("mean", 0, 32)])
def test_the_student_has_the_summary_the_recipe_asks_for(summary, tokens, width, make_recipe):
    recipe = load_recipe(make_recipe(), ["teachers.sam.options.summary=true", f"student.summary={summary}"])
    student = build_student(recipe, build_teachers(recipe)).eval()
    output = student(torch.rand(1, 3, 32, 32))
    assert student.config.num_cls_tokens == tokens
    assert output.summary.shape == (1, width)
    # The heads' hidden width is that of the widest teacher (section 3.2).
    assert {adaptor["hidden_dim"] for adaptor in student.config.adaptors.values()} == {20}


def test_gradients_reach_every_parameter_of_the_student_and_none_of_a_teacher(make_recipe):
    recipe = load_recipe(make_recipe())
    teachers = build_teachers(recipe)
    student = build_student(recipe, teachers).train()
    images = {side: torch.rand(2, 3, side, side) for side in (24, 32, 48)}
    totals, _ = build_distillation(recipe, student)(images[32], teacher_targets(teachers, images))
    totals.sum().backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []
    assert all(p.grad is None and not p.requires_grad for t in teachers.values() for p in t.parameters())


def test_a_student_from_a_checkpoint_keeps_its_weights(make_recipe, tmp_path):
    recipe = load_recipe(make_recipe())
    teachers = build_teachers(recipe)
    first = build_student(recipe, teachers)
    first.save_pretrained(tmp_path / "student")
    again = build_student(load_recipe(make_recipe(), [f"student.checkpoint={tmp_path / 'student'}"]), teachers)
    for (name, left), right in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_teachers_see_the_same_crop_at_their_own_size():
    teacher = PatchTeacher("", image_size=24)
    images = {24: torch.rand(1, 3, 24, 24), 32: torch.zeros(1, 3, 32, 32)}
    assert torch.equal(teacher_targets({"t": teacher}, images)["t"].features, teacher(images[24]).features)


def test_heads_that_are_not_in_a_pass_get_a_gradient_of_zero(make_recipe):
    recipe = load_recipe(make_recipe())
    teachers = build_teachers(recipe)
    model = build_distillation(recipe, build_student(recipe, teachers).train())
    images = {side: torch.rand(2, 3, side, side) for side in (24, 32)}
    totals, terms = model(images[32], teacher_targets({"clip": teachers["clip"]}, images))
    assert set(terms) == {"clip/summary", "clip/features"}
    totals.sum().backward()
    assert all(not p.grad.any() for p in model.student.adaptors["sam"].parameters())
    assert all(p.grad.any() for p in model.student.adaptors["clip"].parameters())

    model.zero_grad()
    totals, terms = model(images[32], {})
    totals.sum().backward()
    assert not terms and not totals.any()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()] == []


def test_the_preferred_resolution_is_one_at_which_the_summary_was_trained(make_recipe):
    """SAM has no summary, so that at the resolution of its group the student's has never been seen by a loss."""
    groups = "stages.main={{steps: 4, resolution: 0, groups: {{"
    groups += "low: {{teachers: [clip], resolution: 32, batch_size: 4}}, "
    groups += "high: {{teachers: [sam], resolution: {}, batch_size: 4}}}}}}"
    for high in (48, 64):
        recipe = load_recipe(make_recipe(), [groups.format(high)])
        full = build_student(recipe, build_teachers(recipe))
        assert full.config.adaptors["sam"]["summary_dim"] is None
        assert stage_student(full, recipe, "main").preferred_resolution == 32
    recipe = load_recipe(make_recipe(), [groups.format(48), "stages.main.groups.high.teachers=[clip, sam]"])
    assert stage_student(full, recipe, "main").preferred_resolution == 48
    fewer = ["stages.main.groups.high.teachers=[clip, sam]", "stages.main.groups.high.batch_size=2"]
    recipe = load_recipe(make_recipe(), [groups.format(48), *fewer])
    assert stage_student(full, recipe, "main").preferred_resolution == 32


def test_a_stage_has_the_heads_of_the_teachers_up_to_it(make_recipe):
    stages = [
        "stages.main.teachers=[clip]",
        "stages.second={steps: 2, resolution: 32, batch_size: 4, teachers: [sam]}",
        "teachers.sam.options.summary=true",
    ]
    recipe = load_recipe(make_recipe(), stages)
    full = build_student(recipe, build_teachers(recipe))
    first, second = (stage_student(full, recipe, name) for name in recipe.stages)
    assert set(first.adaptors) == {"clip"} and set(second.adaptors) == {"clip", "sam"}
    # A CLS token for each teacher from the start; a head that has no teacher any more rests.
    assert first.config.num_cls_tokens == second.config.num_cls_tokens == 2
    assert not any(p.requires_grad for p in second.adaptors["clip"].parameters())
    assert all(p.requires_grad for p in second.adaptors["sam"].parameters())
    for student in (first, second):
        for name, parameter in student.named_parameters():
            assert torch.equal(parameter, full.get_parameter(name)), name
