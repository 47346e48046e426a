"""Students and teachers of every kind behind one interface."""

import pytest
import torch

from helpers.conv_student import ConvStudent, ConvStudentConfig
from transformers_radio import modeling
from transformers_radio.evaluation.models.encoder import load_encoder, load_student
from transformers_radio.evaluation.models.specs import ModelSpec
from transformers_radio.modeling import (
    RadioBackbone,
    RadioBackboneConfig,
    RadioConfig,
    RadioForImageClassification,
    RadioVisionTower,
    RadioVisionTowerConfig,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "max_img_size": 64}
HEAD = {"summary_dim": 20, "feature_dim": 24, "hidden_dim": 16}


@pytest.fixture
def conv_student(tmp_path, monkeypatch):
    """(folder, the convolutional student there), of a type that is one more line in `STUDENTS`."""
    monkeypatch.setitem(modeling.STUDENTS, "conv_student", "helpers.conv_student:ConvStudent")
    adaptors = {"words": {**HEAD, "teacher": "open_clip:ViT-H-14:dfn5b"}, "other": {**HEAD, "teacher": "timm:vit"}}
    student = ConvStudent(ConvStudentConfig(adaptors=adaptors)).eval()
    student.save_pretrained(tmp_path / "student")
    return tmp_path / "student", student


@torch.no_grad()
def test_a_student_of_any_type_is_a_student(conv_student):
    folder, student = conv_student
    encoder = load_encoder(f"conv={folder}")
    assert encoder.is_student and (encoder.image_size, encoder.step, encoder.device.type) == (64, 8, "cpu")
    images = torch.rand(2, 3, 32, 48)
    output, expected = encoder.encode(images), student(images)
    assert output.grid == encoder.features(images)[1] == (4, 6)
    torch.testing.assert_close(output.summary, expected.summary)
    torch.testing.assert_close(encoder.features(images)[0], expected.features)
    torch.testing.assert_close(output.language, expected.adaptors["words"].summary)
    torch.testing.assert_close(encoder.language(images), output.language)
    assert encoder.text_tower() == "open_clip:ViT-H-14:dfn5b"
    settings = encoder.settings()
    assert settings["model"] == str(folder) and settings["adaptor"] == "words"
    assert settings["features"] == "the student's own patch features, 16 wide"
    with pytest.raises(ValueError, match="does not say whose text tower it speaks .its teacher is 'timm:vit'."):
        load_encoder(str(folder), adaptor="other").text_tower()
    with pytest.raises(ValueError, match="has no attention windows: leave window_size out"):
        load_encoder(str(folder), window_size=4)


def test_what_is_no_student_is_named(tmp_path):
    with pytest.raises(OSError, match="^nope: "):
        load_student("nope")
    (tmp_path / "radio_v2.5-h.pth.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="is a torch file, not a folder. Convert it with `transformers-radio convert"):
        load_student(str(tmp_path / "radio_v2.5-h.pth.tar"))


@pytest.mark.parametrize("kind", ["classifier", "backbone", "tower"])
@torch.no_grad()
def test_the_student_inside_a_larger_model_is_a_student(kind, tmp_path):
    torch.manual_seed(0)
    model = {
        "classifier": lambda: RadioForImageClassification(RadioConfig(**SIZES)),
        "backbone": lambda: RadioBackbone(RadioBackboneConfig(**SIZES)),
        "tower": lambda: RadioVisionTower(RadioVisionTowerConfig(radio_config=RadioConfig(**SIZES))),
    }[kind]()
    model.eval().save_pretrained(tmp_path)
    assert ModelSpec.parse(str(tmp_path)).is_student
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(load_student(str(tmp_path)).eval()(images).features, model.model(images).features)
