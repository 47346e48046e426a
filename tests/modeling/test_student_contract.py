"""The contract of every student, kept by the vision transformer and by a student made of convolutions."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.conv_student import ConvStudent, ConvStudentConfig
from helpers.tiny_radio import build, scramble
from transformers_radio import RadioConfig, RadioModel, modeling

ADAPTORS = {
    "clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16, "summary_token": 2},
    "sam": {"summary_dim": None, "feature_dim": 9, "hidden_dim": 8, "upsample_factor": 2},
    "dino": {"summary_dim": 7, "feature_dim": None, "hidden_dim": 8},
}
NEW = {"summary_dim": 5, "feature_dim": 6, "hidden_dim": 8}


def conv_student(**fields):
    torch.manual_seed(0)
    adaptors = {name: {**entry, "summary_token": 0} for name, entry in ADAPTORS.items()}
    return scramble(ConvStudent(ConvStudentConfig(adaptors=adaptors, **fields)).eval())


def vision_transformer(**fields):
    return build(adaptors=ADAPTORS, **fields)


STUDENTS = pytest.mark.parametrize("make", [vision_transformer, conv_student])


def assert_same_heads(found, expected, names):
    assert set(found.adaptors) == set(names)
    for name in names:
        mine, theirs = found.adaptors[name], expected.adaptors[name]
        assert mine.keys() == theirs.keys() and mine.grid == theirs.grid
        assert all(torch.equal(mine[key], theirs[key]) for key in mine if key != "grid")


# ---------------------------------------------------------------- sizes and grids


@STUDENTS
@torch.no_grad()
def test_grids_are_those_of_the_features_and_of_each_adaptor(make):
    model, (height, width) = make(), (96, 32)
    output = model(torch.rand(2, 3, height, width))
    stride = {"RadioModel": 16, "ConvStudent": 8}[type(model).__name__]
    assert output.grid == model.grid(height, width) == (height // stride, width // stride)
    assert output.summary.shape == (2, model.summary_dim)
    assert output.features.shape == (2, output.grid[0] * output.grid[1], model.feature_dim)
    assert output.adaptors["clip"].grid == output.grid
    assert output.adaptors["sam"].grid == (2 * output.grid[0], 2 * output.grid[1])
    assert output.adaptors["sam"].features.shape[1] == 4 * output.features.shape[1]
    assert output.adaptors["dino"].grid is None and output.adaptors["dino"].features is None
    # each pixel of a finer map lies where it belongs: row-major in the adaptor's own grid
    as_map = model.features_to_grid(output.adaptors["sam"].features, height, width)
    assert tuple(as_map.shape[-2:]) == output.adaptors["sam"].grid


@torch.no_grad()
def test_grids_of_padded_and_packed_images():
    model = vision_transformer()
    images, mask = torch.rand(2, 3, 64, 96), torch.zeros(2, 64, 96)
    mask[0], mask[1, :32, :48] = 1, 1
    for window_size in (0, 2):
        sizes = mask.clone()
        sizes[1, :32, :64] = 1  # a multiple of the window
        padded = model(images, pixel_mask=sizes if window_size else mask, window_size=window_size)
        assert padded.grid == (4, 6) and padded.features.shape[1] == 24
        assert padded.adaptors["sam"].grid == (8, 12) and padded.adaptors["sam"].features.shape[1] == 96
        assert padded.adaptors["dino"].grid is None
    for grids in (torch.tensor([[2, 3], [1, 4]]), torch.tensor([[2, 5]])):
        packed = model(torch.rand(10, 768), image_grid_hw=grids)
        assert packed.grid is None and packed.adaptors["sam"].grid is None
        assert "grid" not in packed and "grid" not in packed.adaptors["sam"]


@torch.no_grad()
def test_functions_that_may_return_tensors_only_get_no_grid():
    model = vision_transformer()
    found = torch.func.vmap(lambda image: dict(model(image[None])), randomness="error")(torch.rand(2, 3, 32, 32))
    assert "grid" not in found and found["features"].shape == (2, 1, 4, 32)


def test_the_vit_s_own_sizes():
    model = build(window_size=2)
    assert (model.summary_dim, model.feature_dim, model.min_resolution_step) == (2 * 32, 32, 32)
    assert build(summary_type="mean", summary_idxs=None).summary_dim == 32
    assert model.blocks == list(model.encoder.layer) and len(model.blocks) == 3
    assert set(model._no_split_modules) == {type(block).__name__ for block in model.blocks}
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    assert model.no_weight_decay() == {"embeddings.cls_register_token", "embeddings.position_embedding"}


def test_what_a_student_without_tokens_windows_and_blocks_answers():
    model = conv_student()
    assert (model.patch_size, model.min_resolution_step, model.max_resolution) == (8, 8, 256)
    assert model.preferred_resolution == 64 and model.get_nearest_supported_resolution(37, 45) == (40, 48)
    assert (model.blocks, model.training_options(64, 64), model.training_warnings([(64, 64)])) == ([], {}, [])
    assert (model.attention_saving(64, 64), model.no_weight_decay()) == (0.0, set())
    with pytest.raises(ValueError, match="60x64 pixels.* multiples of 8"):
        model(torch.rand(1, 3, 60, 64))


# ---------------------------------------------------------------- the same model with other heads


@STUDENTS
@torch.no_grad()
def test_fewer_heads_share_every_weight(make):
    model, images = make(), torch.rand(2, 3, 32, 64)
    some = model.with_adaptors(["sam", "clip"])
    assert type(some) is type(model) and list(some.adaptors) == list(some.config.adaptors) == ["sam", "clip"]
    assert list(model.adaptors) == list(model.config.adaptors) == ["clip", "sam", "dino"]
    mine, theirs = model.state_dict(), some.state_dict()
    assert theirs.keys() == {name for name in mine if not name.startswith("adaptors.dino.")}
    assert all(theirs[name].data_ptr() == mine[name].data_ptr() for name in theirs)
    whole, part = model(images), some(images)
    assert torch.equal(part.summary, whole.summary) and torch.equal(part.features, whole.features)
    assert_same_heads(part, whole, ["sam", "clip"])
    next(some.parameters()).add_(1)  # a step of one is a step of the other
    assert torch.equal(some(images).features, model(images).features)
    assert not torch.equal(some(images).features, whole.features)
    assert list(model.with_adaptors([]).adaptors) == []
    with pytest.raises(ValueError, match="other.*out of.*clip"):
        model.with_adaptors(["other"])


@STUDENTS
def test_a_parametrized_model_is_refused(make):
    model = make()
    torch.nn.utils.parametrizations.weight_norm(model.adaptors["clip"].feature_head.fc1)
    for change in (lambda: model.with_adaptors(["clip"]), lambda: model.with_new_adaptors({"new": dict(NEW)})):
        with pytest.raises(ValueError, match="adaptors.clip.feature_head.fc1.weight under another name"):
            change()
    assert list(model.with_adaptors(["sam"]).adaptors) == ["sam"]


@STUDENTS
def test_the_state_of_a_model_comes_along(make):
    model = make()
    model.input_conditioner.norm_mean += 0.25
    conditioner = model.make_preprocessor_external()
    model.adaptors["clip"].requires_grad_(False)
    for training in (True, False):
        for other in (model.train(training).with_adaptors(["clip"]), model.with_new_adaptors({"new": dict(NEW)})):
            assert all(module.training == training for module in other.modules())
            assert not any(weight.requires_grad for weight in other.adaptors["clip"].parameters())
            frozen = {name for name, weight in other.named_parameters() if not weight.requires_grad}
            assert all(name.startswith("adaptors.clip.") for name in frozen)
            images = torch.rand(1, 3, 32, 32)
            with torch.no_grad():
                assert torch.equal(
                    other.eval()(conditioner(images)).summary[:, :16],
                    model.eval()(conditioner(images)).summary[:, :16],
                )
            model.train(training)
    other.requires_grad_(False)
    assert next(model.parameters()).requires_grad  # freezing one does not freeze the other


@torch.no_grad()
def test_the_attention_and_the_precision_come_along():
    model = vision_transformer(attn_implementation="eager").to(torch.bfloat16)
    for other in (model.with_adaptors(["clip"]), model.with_new_adaptors({"new": dict(NEW)})):
        assert other.config._attn_implementation == "eager" and other.dtype == torch.bfloat16
        assert {weight.dtype for weight in other.parameters()} == {torch.bfloat16}
        assert other.input_conditioner.norm_mean.dtype == torch.float32
        found = other(torch.rand(1, 3, 32, 32))
        assert found.features.dtype == torch.bfloat16


@STUDENTS
@torch.no_grad()
def test_a_new_head_without_a_summary_leaves_the_model_as_it_is(make, caplog):
    model, images = make(), torch.rand(2, 3, 32, 64)
    more = model.with_new_adaptors({"new": {**NEW, "summary_dim": None}, "fine": {**NEW, "summary_dim": None}})
    assert list(more.adaptors) == [*ADAPTORS, "new", "fine"] and list(model.adaptors) == list(ADAPTORS)
    mine, theirs = model.state_dict(), more.state_dict()
    assert all(theirs[name].data_ptr() == mine[name].data_ptr() for name in mine if name != "summary_idxs")
    before, after = model(images), more(images)
    assert torch.equal(after.summary, before.summary) and torch.equal(after.features, before.features)
    assert torch.equal(after.adaptors["sam"].features, before.adaptors["sam"].features)
    assert after.adaptors["new"].features.shape == (*before.features.shape[:2], 6)
    head = more.adaptors["new"].feature_head.fc1.weight
    assert head.isfinite().all() and head.std() > 0 and not caplog.records
    with pytest.raises(ValueError, match="has an adaptor 'sam'"):
        model.with_new_adaptors({"sam": dict(NEW)})


@pytest.mark.parametrize(
    ("fields", "tokens", "idxs", "token", "line"),
    [
        # heads read 0 and 2 of three tokens: the second is free, and comes into the summary
        (
            {},
            3,
            [0, 2, 1],
            1,
            "CLS token 1, which no other adaptor reads, and the student's summary has it at its end",
        ),
        (
            {"num_cls_tokens": 4, "summary_idxs": [0, 1, 2]},
            4,
            [0, 1, 2],
            1,
            "CLS token 1, which no other adaptor reads",
        ),
        ({"summary_type": "mean", "num_cls_tokens": 0, "summary_idxs": None}, 0, None, 0, ""),
    ],
)
def test_where_a_new_summary_is_read(fields, tokens, idxs, token, line, caplog):
    is_mean = fields.get("summary_type") == "mean"
    adaptors = {name: {**entry, "summary_token": 0} for name, entry in ADAPTORS.items()} if is_mean else ADAPTORS
    model = build(adaptors=adaptors, **fields)
    more = model.with_new_adaptors({"new": dict(NEW)})
    assert (more.config.num_cls_tokens, more.config.adaptors["new"]["summary_token"]) == (tokens, token)
    assert line in caplog.text and bool(caplog.records) is not is_mean
    if idxs is not None:
        assert more.config.summary_idxs == more.summary_idxs.tolist() == idxs
        assert model.config.summary_idxs == (fields.get("summary_idxs") or [0, 2])


@torch.no_grad()
def test_a_new_summary_grows_a_token_in_front_of_the_registers(caplog, tmp_path):
    adaptors = {**ADAPTORS, "third": {"summary_dim": 4, "feature_dim": None, "hidden_dim": 8, "summary_token": 1}}
    model, images = build(adaptors=adaptors), torch.rand(2, 3, 32, 64)
    more = model.with_new_adaptors({"new": dict(NEW), "newer": dict(NEW)})
    assert "'new' is read from CLS token 3, which is new, a copy of token 0" in caplog.text
    assert (more.config.num_cls_tokens, more.config.summary_idxs) == (5, [0, 2, 3, 4])
    old, new = model.embeddings.cls_register_token, more.embeddings.cls_register_token
    assert torch.equal(new, old[[0, 1, 2, 0, 0, 3, 4]])
    output = more(images)
    assert output.summary.shape == (2, more.summary_dim) == (2, 4 * 32)
    assert torch.equal(output.summary[:, :32], output.summary[:, 64:96])  # twins until they learn
    more.save_pretrained(tmp_path)
    assert torch.equal(RadioModel.from_pretrained(tmp_path)(images).summary, output.summary)
    assert model.config.num_cls_tokens == 3 and list(model.adaptors) == list(adaptors)


def test_one_token_for_all_summaries_serves_a_new_one_too(caplog):
    adaptors = {name: {**entry, "summary_token": 1} for name, entry in ADAPTORS.items()}
    more = build(adaptors=adaptors, summary_idxs=[1]).with_new_adaptors({"new": dict(NEW)})
    assert more.config.adaptors["new"]["summary_token"] == 1 and more.config.summary_idxs == [1]
    assert "CLS token 1, which all summaries of this student share" in caplog.text


# ---------------------------------------------------------------- training


def test_configurations_for_training():
    entries = {name: {**entry, "summary_token": 0} for name, entry in ADAPTORS.items()}
    fields = {"num_hidden_layers": 2, "pos_dropout": 0.1}
    per_teacher = RadioConfig.for_training("vit-ti-16", entries, "cls_per_teacher", **fields)
    assert [a["summary_token"] for a in per_teacher.adaptors.values()] == [0, 0, 1]
    assert (per_teacher.num_cls_tokens, per_teacher.summary_idxs) == (2, [0, 1])
    assert (per_teacher.hidden_size, per_teacher.num_hidden_layers, per_teacher.pos_dropout) == (192, 2, 0.1)
    shared = RadioConfig.for_training("vit-ti-16", entries, "cls")
    assert (shared.num_cls_tokens, shared.summary_idxs, shared.summary_type) == (1, [0], "cls")
    mean = RadioConfig.for_training("vit-ti-16", entries, "mean")
    assert (mean.num_cls_tokens, mean.summary_type, mean.summary_dim) == (0, "mean", 192)
    dense = RadioConfig.for_training("vit-ti-16", {"sam": entries["sam"]}, "cls_per_teacher")
    assert dense.num_cls_tokens == 1
    assert all(entry["summary_token"] == 0 for entry in entries.values())  # the caller's own are left alone
    for size, summary, options, message in (
        ("vit-x", "cls", {}, "Unknown size 'vit-x'"),
        ("vit-ti-16", "max", {}, "summary is 'max', expected"),
        ("vit-ti-16", "cls", {"depth": 2}, "no field depth"),
    ):
        with pytest.raises(ValueError, match=message):
            RadioConfig.for_training(size, entries, summary, **options)
    assert ConvStudent(ConvStudentConfig.for_training("large", entries, "mean")).feature_dim == 32


def test_options_of_a_training_forward_are_the_drawn_windows():
    model = build(train_window_sizes=[2, 3, 4, 6, 12], train_window_probability=0.75)
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    drawn = [model.training_options(192, 192, first) for _ in range(20)]
    assert drawn == [{"window_size": model.sample_window_size(192, 192, second)} for _ in range(20)]
    assert {size for options in drawn for size in options.values()} == {0, 2, 3, 4, 6}
    assert build().training_options(192, 192) == {}


def test_windows_that_no_training_image_draws_are_named():
    model = build(train_window_sizes=[2, 3, 5])
    assert model.training_warnings([(32, 32), (64, 64), (48, 96)]) == [
        "train_window_sizes: 5 is never drawn, as the grids have sides of [2, 3, 4, 6]"
    ]
    with pytest.raises(ValueError, match=r"train_window_sizes is \[2, 3, 5\], and none .* sides of \[2\]"):
        model.training_warnings([(32, 32)])
    assert build().training_warnings([(32, 32)]) == []


@pytest.mark.parametrize(("height", "width", "windows"), [(256, 256, [4, 8]), (128, 384, [4, 8]), (32, 32, [])])
def test_drawn_windows_save_what_counted_passes_save(height, width, windows):
    sizes = {"num_hidden_layers": 8, "window_num_global": 2, "num_registers": 0}
    model = build(train_window_sizes=[5, 4, 8, 32], train_window_probability=0.75, **sizes).to("meta").train()

    def flops(window):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, height, width, device="meta"), window_size=window)
        return counter.get_total_flops()

    attention = 8 * 4 * (height * width // 256 + 3) ** 2 * 32
    saved = sum(flops(0) - flops(window) for window in windows) / max(len(windows), 1)
    expected = 0.75 * saved / attention
    assert model.attention_saving(height, width) == pytest.approx(expected, rel=0.02) and (expected > 0) == bool(
        windows
    )


# ---------------------------------------------------------------- the dict of students


def test_students_are_found_by_their_type(monkeypatch):
    assert modeling.student_class("radio") is RadioModel
    monkeypatch.setitem(modeling.STUDENTS, "conv_student", "helpers.conv_student:ConvStudent")
    assert modeling.student_class("conv_student") is ConvStudent
    with pytest.raises(ValueError, match="'clip' is not the type of a student; choose one of radio, .*, conv_student"):
        modeling.student_class("clip")


@pytest.mark.parametrize(
    "line", ["no_colon", "no.such.module:X", "transformers_radio.modeling.modeling_radio:Missing"]
)
def test_a_line_that_names_no_student_is_quoted(line, monkeypatch):
    monkeypatch.setitem(modeling.STUDENTS, "broken", line)
    with pytest.raises(ValueError, match=f"STUDENTS\\['broken'\\] is '{line}', which cannot be imported"):
        modeling.student_class("broken")
    assert modeling.student_class("radio") is RadioModel


def test_the_dict_of_students_loads_no_torch():
    code = "import sys, transformers_radio.modeling as m; assert 'radio' in m.STUDENTS; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
