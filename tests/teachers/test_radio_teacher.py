"""A RADIO student as teacher, against the model it was saved from."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.conv_student import ConvStudent, ConvStudentConfig
from transformers_radio import modeling
from transformers_radio.modeling import RadioConfig, RadioModel
from transformers_radio.teachers import build_teacher

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_img_size": 128}
ADAPTORS = {
    "clip": {"summary_dim": 20, "feature_dim": 24, "hidden_dim": 16, "summary_token": 0},
    "sam": {"summary_dim": None, "feature_dim": 28, "hidden_dim": 16, "summary_token": 0},
    "text": {"summary_dim": 20, "feature_dim": None, "hidden_dim": 16, "summary_token": 1},
}


@pytest.fixture
def student(tmp_path, randomize):
    """(folder, the student saved there): two CLS tokens, registers, three adaptors, best at 64 px."""
    config = RadioConfig(
        **SMALL, num_cls_tokens=2, num_registers=3, adaptors=ADAPTORS, preferred_resolution=64, pos_dropout=0.5
    )
    original = RadioModel(config)
    statistics = {name: buffer.clone() for name, buffer in original.named_buffers()}
    randomize(original)
    for name, buffer in original.named_buffers():  # mean, std and token indices stay as they are
        buffer.copy_(statistics[name])
    original.save_pretrained(tmp_path)
    return str(tmp_path), original


@pytest.mark.parametrize("size", [None, 96])
def test_backbone(student, images, assert_contract, size):
    path, original = student
    teacher = build_teacher("transformers", path, image_size=size)
    side = size or 64
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size) == (64, 32, side, 16)
    output = assert_contract(teacher)
    with torch.no_grad():
        expected = original(images(side))  # in [0, 1]: the student normalizes by itself, and only once
    assert output.grid == (side // 16, side // 16)
    torch.testing.assert_close(output.summary, expected.summary)
    torch.testing.assert_close(output.features, expected.features)


def test_agrees_with_transformers_own_radio(tmp_path, images, randomize):
    """A plain student, whose file transformers' own class reads too: the independent source of its targets."""
    config = RadioConfig(**SMALL, num_cls_tokens=2, num_registers=3, preferred_resolution=64)
    RadioModel(config).save_pretrained(tmp_path)
    native = transformers.RadioModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = native(images(64))
    output = build_teacher("transformers", str(tmp_path))(images(64))
    torch.testing.assert_close(output.summary, expected.summary)
    torch.testing.assert_close(output.features, expected.features)


@pytest.mark.parametrize(("adaptor", "summary_dim", "feature_dim"), [("clip", 20, 24), ("sam", None, 28)])
def test_adaptor(student, images, assert_contract, adaptor, summary_dim, feature_dim):
    path, original = student
    teacher = build_teacher("transformers", path, adaptor=adaptor)
    assert (teacher.summary_dim, teacher.feature_dim) == (summary_dim, feature_dim)
    output = assert_contract(teacher)
    with torch.no_grad():
        expected = original(images(64)).adaptors[adaptor]
    torch.testing.assert_close(output.features, expected.features)
    if summary_dim is not None:
        torch.testing.assert_close(output.summary, expected.summary)


def test_bfloat16(student, images):
    path, original = student
    teacher = build_teacher("transformers", path, dtype="bfloat16")
    with torch.no_grad():
        expected = original(images(64)).features
    features = teacher(images(64)).features
    assert features.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(features.flatten(), expected.flatten(), dim=0)
    assert 0.99 < cosine < 0.999999  # close to the float32 original, and really computed in bfloat16


def test_wrong_arguments(student):
    path, _ = student
    with pytest.raises(ValueError, match="adaptor='dino' is unknown: .* has clip, sam, text"):
        build_teacher("transformers", path, adaptor="dino")
    with pytest.raises(ValueError, match="adaptor 'text' of .* has no features"):
        build_teacher("transformers", path, adaptor="text")
    with pytest.raises(ValueError, match="radio teacher does not know 'features': its options are adaptor"):
        build_teacher("transformers", path, features="trunk")
    with pytest.raises(ValueError, match="image_size=70 .*patch size 16: use 64"):
        build_teacher("transformers", path, image_size=70)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_weights_must_fit(student, change):
    path, _ = student
    weights = load_file(f"{path}/model.safetensors")
    name = next(name for name in weights if name.startswith("adaptors.clip"))
    tensor = weights.pop(name)
    if change == "unexpected":
        weights[name] = tensor
        name = "adaptors.extra.weight"
        weights[name] = tensor.clone()
    save_file(weights, f"{path}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        build_teacher("transformers", path)


@pytest.mark.parametrize("adaptor", [None, "clip"])
def test_any_student_can_teach(tmp_path, images, assert_contract, randomize, monkeypatch, adaptor):
    """A convolutional student of one more line in `STUDENTS`, with a head on a finer grid."""
    monkeypatch.setitem(modeling.STUDENTS, "conv_student", "helpers.conv_student:ConvStudent")
    entry = {"summary_dim": 20, "feature_dim": 24, "hidden_dim": 16, "upsample_factor": 2}
    student = ConvStudent(ConvStudentConfig(adaptors={"clip": entry})).eval()
    student.save_pretrained(tmp_path)
    teacher = build_teacher("transformers", str(tmp_path), adaptor=adaptor)
    output = assert_contract(teacher)
    with torch.no_grad():
        expected = student(images(64))
    expected = expected if adaptor is None else expected.adaptors[adaptor]
    assert output.grid == ((8, 8) if adaptor is None else (16, 16))
    torch.testing.assert_close(output.summary, expected.summary)
    torch.testing.assert_close(output.features, expected.features)


def test_a_native_file_with_adaptors_in_its_config_only(student, images):
    """A configuration that promises heads which the file does not have must not give random targets."""
    path, _ = student
    weights = load_file(f"{path}/model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("adaptors.")}
    save_file(kept, f"{path}/model.safetensors", metadata={"format": "pt"})
    assert json.loads(open(f"{path}/config.json").read())["adaptors"]
    with pytest.raises(ValueError, match="adaptors"):
        build_teacher("transformers", path, adaptor="clip")
