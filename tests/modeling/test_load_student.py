"""A student's weights in transformers' larger models, and the warning where they are missing."""

import pytest
import torch
import transformers
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    DPTConfig,
    DPTForDepthEstimation,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from helpers.conv_student import ConvStudent, ConvStudentConfig
from helpers.tiny_radio import build
from transformers_radio import (
    RadioBackbone,
    RadioBackboneConfig,
    RadioConfig,
    RadioModel,
    RadioVisionTower,
    RadioVisionTowerConfig,
    load_student,
)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    build(adaptors={"clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16}}).save_pretrained(folder)
    return folder


def uper_net(folder):
    backbone_config = RadioBackboneConfig.from_pretrained(folder, out_indices=[0, 1, 2, 3])
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone_config, **sizes))


def mask2former(folder):
    config = Mask2FormerConfig(
        backbone_config=RadioBackboneConfig.from_pretrained(folder, out_indices=[0, 1, 2, 3]),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=4,
    )
    return Mask2FormerForUniversalSegmentation(config)


def dpt(folder):
    backbone_config = RadioBackboneConfig.from_pretrained(
        folder, out_indices=[0, 1, 2, 3], reshape_hidden_states=False
    )
    sizes = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "reassemble_factors": [4, 2, 1, 0.5]}
    return DPTForDepthEstimation(DPTConfig(backbone_config=backbone_config, **sizes))


def detr(folder):
    config = DetrConfig(
        backbone_config=RadioBackboneConfig.from_pretrained(folder, out_indices=[2]),
        use_timm_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
    )
    return DetrForObjectDetection(config)


def llava(folder):
    text_config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10
    )
    vision_config = RadioVisionTowerConfig.from_pretrained(folder)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=9)
    )


def run(model, pixel_values):
    """Runs RADIO only: the features that the larger model gets from it."""
    model.eval()
    if isinstance(model, LlavaForConditionalGeneration):
        return model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]
    backbone = next(module for module in model.modules() if isinstance(module, RadioBackbone))
    last = backbone(pixel_values).feature_maps[-1]
    return last.flatten(2).transpose(1, 2) if last.ndim == 4 else last[:, 1:]


BUILD = {"UperNet": uper_net, "Mask2Former": mask2former, "DPT": dpt, "DETR": detr, "LLaVA": llava}


@pytest.mark.parametrize("name", BUILD)
def test_the_student_s_features_reach_the_larger_model(student_folder, name, caplog):
    model = BUILD[name](student_folder)
    assert load_student(model, str(student_folder)) is model
    pixel_values = torch.rand(1, 3, 32, 48)
    native = transformers.RadioModel.from_pretrained(student_folder).eval()
    layer = 2 if name == "DETR" else 3
    expected = native(pixel_values, output_hidden_states=True).hidden_states[layer][:, 5:]
    torch.testing.assert_close(run(model, pixel_values), expected, atol=1e-5, rtol=1e-5)
    if name != "LLaVA":
        model(pixel_values)  # the larger model takes them
    assert "random" not in caplog.text


@pytest.mark.parametrize("name", ["UperNet", "LLaVA"])
def test_random_weights_are_reported_once_and_only_if_random(student_folder, tmp_path, name, caplog):
    pixel_values = torch.rand(1, 3, 32, 48)
    model = BUILD[name](student_folder).to(torch.float64).float()
    assert not caplog.text
    run(model, pixel_values)
    assert f"the configuration of {student_folder}, but its weights are random. Load them with" in caplog.text
    assert caplog.text.count("random") == 1
    caplog.clear()
    run(model, pixel_values)
    model.save_pretrained(tmp_path)
    assert str(student_folder) not in (tmp_path / "config.json").read_text()
    run(type(model).from_pretrained(tmp_path), pixel_values)  # complete as saved
    run(type(model)(model.config), pixel_values)  # the first warning was about this configuration's student
    assert caplog.text.count("random") == 1
    caplog.clear()

    model = BUILD[name](student_folder)
    if name == "UperNet":
        model.backbone = RadioBackbone.from_pretrained(student_folder, config=model.config.backbone_config)
    else:
        model.model.vision_tower = RadioVisionTower.from_radio(RadioModel.from_pretrained(student_folder))
    run(model, pixel_values)
    state = model.state_dict()
    model = BUILD[name](student_folder)
    model.load_state_dict(state)
    run(model, pixel_values)
    run(uper_net_from_scratch(), pixel_values)  # random on purpose
    assert "random" not in caplog.text


def uper_net_from_scratch():
    config = RadioBackboneConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, out_indices=[0, 1, 2, 3])
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **sizes))


def test_misfits_are_named(student_folder):
    student = RadioModel.from_pretrained(student_folder)
    with pytest.raises(ValueError, match="Linear has no RADIO backbone or vision tower"):
        load_student(torch.nn.Linear(2, 2), student)
    with pytest.raises(ValueError, match="num_registers, .* differ; build it from the student's own"):
        load_student(uper_net_from_scratch(), student)
    fields = {**student.config.to_dict(), "num_attention_heads": 4}  # the weights would fit
    with pytest.raises(ValueError, match="RadioModel: num_attention_heads differ"):
        load_student(RadioModel(RadioConfig.from_dict(fields)), student)


def test_a_part_of_another_kind_of_student_is_filled_too(tmp_path):
    student, images = ConvStudent(ConvStudentConfig()).eval(), torch.rand(1, 3, 32, 48)
    student.save_pretrained(tmp_path)
    model = torch.nn.Sequential(ConvStudent(ConvStudentConfig()).eval())
    assert not torch.equal(model(images).features, student(images).features)
    load_student(model, tmp_path)
    assert torch.equal(model(images).features, student(images).features)
