import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import transformers_radio
from helpers.tiny_teachers import PatchTeacher
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.training import load_recipe, train
from transformers_radio.training.balancing import NaiveBalancing
from transformers_radio.training.distill import (
    Distillation,
    distillation_losses,
    teacher_targets,
)
from transformers_radio.training.losses import loss_terms, match_loss
from transformers_radio.training.student import TeacherShape, stage_student
from transformers_radio.training.student import build_student as build_student_of_shapes
from transformers_radio.training.teachers import load_teacher


def build_teachers(recipe):
    return {name: load_teacher(name, spec) for name, spec in recipe.teachers.items()}


def build_student(recipe, teachers):
    return build_student_of_shapes(recipe, {name: TeacherShape.of(teacher) for name, teacher in teachers.items()})


def build_distillation(recipe, student):
    return Distillation(student, NaiveBalancing(loss_terms(recipe, "main", student)), recipe.loss)


def test_every_term_of_the_loss_is_that_of_the_equations(make_recipe):
    """Equations 1 to 3 and the larger grid, written out again with torch's own functions."""
    recipe = load_recipe(make_recipe(), ["teachers.clip.summary_weight=0.5", "teachers.sam.feature_weight=2"])
    teachers = build_teachers(recipe)
    student = build_student(recipe, teachers).eval()
    images = {side: torch.rand(3, 3, side, side) for side in (24, 32, 48)}
    output = student(images[32])
    terms = loss_terms(recipe, "main", student)
    losses = distillation_losses(output, teacher_targets(teachers, images), terms, recipe.loss)
    losses = {str(term): values for term, values in losses.items()}
    assert set(losses) == {"clip/summary", "clip/features", "sam/features"}

    clip = teachers["clip"](images[24])
    summary = 1 - F.cosine_similarity(output.adaptors["clip"].summary, clip.summary)  # (B,)
    torch.testing.assert_close(losses["clip/summary"], summary)
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
        torch.testing.assert_close(losses[f"{name}/features"], expected[name])
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
    totals, losses = model(images[32], teacher_targets({"clip": teachers["clip"]}, images))
    assert {str(term) for term in losses} == {"clip/summary", "clip/features"}
    totals.sum().backward()
    assert all(not p.grad.any() for p in model.student.adaptors["sam"].parameters())
    assert all(p.grad.any() for p in model.student.adaptors["clip"].parameters())

    model.zero_grad()
    totals, losses = model(images[32], {})
    totals.sum().backward()
    assert not losses and not totals.any()
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
    for sizes, expected in (((4, 2, 3), 48), ((6, 2, 3), 32), ((1, 1, 3), 64)):  # of nine images the fifth, ...
        parts = zip(("low", "mid", "high"), (32, 48, 64), sizes, strict=True)
        three = [f"{name}: {{teachers: [clip, sam], resolution: {side}, batch_size: {n}}}" for name, side, n in parts]
        recipe = load_recipe(
            make_recipe(), [f"stages.main={{steps: 4, resolution: 0, groups: {{{', '.join(three)}}}}}"]
        )
        assert recipe.stages["main"].preferred_resolution({"clip"}) == expected


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
    # A CLS token for each teacher from the start; a head whose teacher is absent is frozen.
    assert first.config.num_cls_tokens == second.config.num_cls_tokens == 2
    assert not any(p.requires_grad for p in second.adaptors["clip"].parameters())
    assert all(p.requires_grad for p in second.adaptors["sam"].parameters())
    for student in (first, second):
        for name, parameter in student.named_parameters():
            assert torch.equal(parameter, full.get_parameter(name)), name


CHECKPOINT = "helpers.tiny_teachers:PatchTeacher"
NEW = f"teachers.new={{type: python, checkpoint: '{CHECKPOINT}', image_size: 24, options: {{width: 12}}}}"


def saved_student(make_recipe, folder, *overrides):
    recipe = load_recipe(make_recipe(), list(overrides))
    student = build_student(recipe, build_teachers(recipe))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    student.save_pretrained(folder)
    return student.eval()


def continued(make_recipe, folder, *overrides):
    recipe = load_recipe(make_recipe(), [f"student.checkpoint={folder}", *overrides])
    return build_student(recipe, build_teachers(recipe)).eval(), recipe


def heads_of(student, images):
    with torch.no_grad():
        output = student(images)
    return output, {name: [t for t in (a.summary, a.features) if t is not None] for name, a in output.adaptors.items()}


def test_a_new_teacher_without_a_summary_changes_no_output(make_recipe, tmp_path, caplog):
    first = saved_student(make_recipe, tmp_path)
    student, _ = continued(make_recipe, tmp_path, NEW, "teachers.new.options.summary=false")
    assert student.config.num_cls_tokens == 1 and set(student.adaptors) == {"clip", "sam", "new"}
    images = torch.rand(2, 3, 32, 32)
    (before, old), (after, heads) = heads_of(first, images), heads_of(student, images)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    for name in ("clip", "sam"):
        assert all(torch.equal(a, b) for a, b in zip(heads[name], old[name], strict=True))
    assert not caplog.records


def test_a_new_teacher_with_a_summary_gets_a_token_behind_the_others(make_recipe, tmp_path, caplog):
    """[CLS..., registers..., patches]: the new token comes before the registers, as the twin of the first one."""
    first = saved_student(make_recipe, tmp_path, "student.config.num_registers=2")
    with pytest.raises(ValueError, match="do not have the shapes that student.config .*'num_registers': 1"):
        continued(make_recipe, tmp_path, NEW)
    caplog.clear()
    student, _ = continued(make_recipe, tmp_path, NEW, "student.config.num_registers=2")
    config = student.config
    assert (config.num_cls_tokens, config.summary_idxs, config.adaptors["new"]["summary_token"]) == (2, [0, 1], 1)
    assert "summary of the new adaptor 'new' is read from CLS token 1, which is new, a copy of token 0" in caplog.text
    old, new = (one.embeddings.cls_register_token for one in (first, student))
    assert torch.equal(new, old[[0, 0, 1, 2]])
    same = {name for name, _ in first.named_parameters()} - {"embeddings.cls_register_token"}
    assert all(torch.equal(first.get_parameter(name), student.get_parameter(name)) for name in same)

    images = torch.rand(2, 3, 32, 32)
    (before, _), (after, _) = heads_of(first, images), heads_of(student, images)
    assert after.summary.shape == (2, 64)
    assert torch.equal(after.summary[:, :32], after.summary[:, 32:])  # twins until they learn
    # What attends to one token more is another network: equal only where the twin is masked out again.
    assert not torch.allclose(after.features, before.features, atol=1e-4)
    with mask_token(student, 1):
        masked, heads = heads_of(student, images)
    torch.testing.assert_close(masked.features, before.features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked.summary[:, :32], before.summary, rtol=1e-4, atol=1e-5)

    student.save_pretrained(tmp_path / "grown")
    again = RadioModel.from_pretrained(tmp_path / "grown").eval()
    assert torch.equal(again(images).summary, after.summary)


@contextmanager
def mask_token(student, token):
    """No other token attends to this one."""

    def masked(module, query, key, value, attention_mask, **kwargs):
        bias = torch.zeros(1, 1, 1, key.shape[2])
        bias[..., token] = float("-inf")
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=kwargs["scaling"])
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("masked", masked)
    before = student.config._attn_implementation
    student.config._attn_implementation = "masked"
    yield
    student.config._attn_implementation = before


@pytest.mark.parametrize(
    ("summary", "teachers", "token", "tokens", "line"),
    [
        # a student of the other kind: two teachers share one token, and so does a third
        ("cls", ["teachers.sam.options.summary=true"], 0, 1, "CLS token 0, which all summaries of this student share"),
        ("mean", ["teachers.sam.options.summary=true"], 0, 0, ""),
        (
            "cls_per_teacher",
            ["teachers.sam.options.summary=true"],
            2,
            3,
            "CLS token 2, which is new, a copy of token 0",
        ),
        # no head has read the token
        ("cls_per_teacher", ["teachers.clip.summary_weight=0"], 0, 1, "CLS token 0, which no other adaptor reads"),
    ],
)
def test_where_a_new_summary_is_read(summary, teachers, token, tokens, line, make_recipe, tmp_path, caplog):
    first = saved_student(make_recipe, tmp_path, f"student.summary={summary}", *teachers)
    student, _ = continued(make_recipe, tmp_path, NEW, *teachers)
    config = student.config
    assert (config.adaptors["new"]["summary_token"], config.num_cls_tokens) == (token, tokens)
    assert config.summary_idxs == list(range(tokens)) and line in caplog.text
    images = torch.rand(1, 3, 32, 32)
    if tokens == first.config.num_cls_tokens:
        assert torch.equal(student(images).last_hidden_state, first(images).last_hidden_state)


def test_a_token_that_the_summary_left_out_comes_into_it(make_recipe, tmp_path):
    first = saved_student(make_recipe, tmp_path / "saved")
    config = RadioConfig.from_dict(
        {**first.config.to_dict(), "num_cls_tokens": 3, "summary_idxs": [0], "num_registers": 0}
    )
    RadioModel(config).save_pretrained(tmp_path / "three")
    student, _ = continued(make_recipe, tmp_path / "three", NEW, "student.config.num_registers=0")
    assert (student.config.num_cls_tokens, student.config.summary_idxs) == (3, [0, 1])
    assert student.summary_idxs.tolist() == [0, 1]


def test_adaptors_without_a_teacher_stay_frozen_unless_told_otherwise(make_recipe, tmp_path, caplog):
    first = saved_student(make_recipe, tmp_path)
    path = make_recipe()
    text = path.read_text()
    path.write_text(text[: text.index("  sam:")] + text[text.index("data:") :])

    def only_clip(*overrides):
        recipe = load_recipe(path, [f"student.checkpoint={tmp_path}", *overrides])
        return stage_student(build_student(recipe, build_teachers(recipe)), recipe, "main")

    student = only_clip()
    assert set(student.adaptors) == {"clip", "sam"}
    assert not any(parameter.requires_grad for parameter in student.adaptors["sam"].parameters())
    assert all(parameter.requires_grad for parameter in student.adaptors["clip"].parameters())
    assert "adaptor 'sam' has no teacher in this recipe: it is kept as it is, frozen" in caplog.text
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(student.eval()(images).adaptors["sam"].features, first(images).adaptors["sam"].features)
    caplog.clear()
    assert set(only_clip("student.keep_adaptors=[]").adaptors) == {"clip"}
    assert "adaptor 'sam' has no teacher in this recipe: it is left out, as student.keep_adaptors says" in caplog.text
    assert set(only_clip("student.keep_adaptors=[sam]").adaptors) == {"clip", "sam"}
    with pytest.raises(
        ValueError, match="student.keep_adaptors names 'clip'; .* beside the recipe's teachers, .* sam"
    ):
        only_clip("student.keep_adaptors=[clip]")
    with pytest.raises(ValueError, match=r"student.keep_adaptors is \['sam'\]; expected a student.checkpoint"):
        load_recipe(path, ["student.keep_adaptors=[sam]"])


def test_a_student_names_its_teachers_without_this_machines_folders(make_recipe, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "sam_vit_h.pth").touch()
    package = Path(transformers_radio.__file__).parent / "quickstart" / "teachers"
    teachers = {
        "clip": ("open_clip", f"{package}/clip", "open_clip:package:quickstart/teachers/clip"),
        "sam": ("segment_anything", f"{tmp_path}/secret/sam_vit_h.pth", "segment_anything:local:sam_vit_h.pth"),
    }
    recipe = load_recipe(make_recipe())
    for name, (kind, checkpoint, _) in teachers.items():
        recipe.teachers[name] = replace(recipe.teachers[name], type=kind, checkpoint=checkpoint)
    shapes = {name: TeacherShape(8, 8, 32, 8, weights=f"hash of {name}") for name in teachers}
    adaptors = build_student_of_shapes(recipe, shapes).config.adaptors
    assert {name: adaptors[name]["teacher"] for name in teachers} == {name: one[2] for name, one in teachers.items()}
    assert {adaptors[name]["teacher_weights"] for name in teachers} == {"hash of clip", "hash of sam"}


def test_a_head_with_a_finer_grid_trains(make_recipe, tmp_path):
    """An adaptor with an upsample_factor predicts several positions per patch; its own grid is compared."""
    first = saved_student(make_recipe, tmp_path / "first")
    adaptors = {name: dict(adaptor) for name, adaptor in first.config.adaptors.items()}
    adaptors["sam"]["upsample_factor"] = 2
    config = RadioConfig.from_dict({**first.config.to_dict(), "adaptors": adaptors})
    RadioModel(config).save_pretrained(tmp_path / "finer")
    recipe = load_recipe(make_recipe(), [f"student.checkpoint={tmp_path / 'finer'}", "stages.main.steps=30"])
    teachers = build_teachers(recipe)
    student = build_student(recipe, teachers).eval()
    images = {side: torch.rand(2, 3, side, side) for side in (24, 32, 48)}
    output = student(images[32], adaptors=["sam"])
    assert output.grid == (4, 4) and output.adaptors["sam"].grid == (8, 8)
    terms = loss_terms(recipe, "main", student)
    losses = distillation_losses(output, teacher_targets({"sam": teachers["sam"]}, images), terms, recipe.loss)
    target = teachers["sam"](images[48]).features.mT.unflatten(2, (6, 6))
    target = F.interpolate(target, size=(8, 8), mode="bilinear").flatten(2).mT
    (found,) = losses.values()
    torch.testing.assert_close(found, match_loss(output.adaptors["sam"].features, target))

    model = RadioModel.from_pretrained(train(recipe).student_dir)
    assert model.config.adaptors["sam"]["upsample_factor"] == 2
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["sam/features"] < 0.9 * lines[0]["sam/features"]
