"""E-RADIO saved and loaded, with heads, and inside transformers' detectors, segmenters and LLaVA."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RTDetrConfig,
    RTDetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from transformers_radio import (
    ERadioBackbone,
    ERadioConfig,
    ERadioForImageClassification,
    ERadioForSemanticSegmentation,
    ERadioModel,
    RadioBackboneConfig,
    RadioConfig,
    RadioImageProcessor,
    RadioVisionTower,
    RadioVisionTowerConfig,
    load_student,
)

ADAPTORS = {
    "clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16},
    "sam": {"summary_dim": None, "feature_dim": 6, "hidden_dim": 16},
}
SHAPE = {"embed_dim": 8, "depths": [1, 2, 1, 2], "num_heads": [2, 4], "stem_channels": 6}


def build(**fields):
    torch.manual_seed(0)
    model = ERadioModel(ERadioConfig(**{**SHAPE, "adaptors": ADAPTORS, **fields}))
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def student():
    return build()


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    RadioImageProcessor(size={"height": 90, "width": 70}, size_divisor=student.min_resolution_step).save_pretrained(
        folder
    )
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


@torch.no_grad()
def test_a_saved_student_is_the_same_through_every_loader(student, folder):
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(folder / "image.png", return_tensors="pt")
    assert type(processor) is RadioImageProcessor and inputs.pixel_values.shape == (1, 3, 96, 64)
    expected = student(**inputs)
    for model in (ERadioModel.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert type(model) is ERadioModel and not model.training
        assert torch.equal(model(**inputs).summary, expected.summary)
        assert torch.equal(model(**inputs).adaptors["sam"].features, expected.adaptors["sam"].features)
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ERadioConfig and type(AutoModel.from_config(config)) is ERadioModel
    code = (
        "import sys, torch; from unittest import mock; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoBackbone, AutoImageProcessor, AutoModel\n"
        "from transformers.models.auto import auto_factory\n"
        "trust = {'trust_remote_code': True}\n"
        "inputs = AutoImageProcessor.from_pretrained('.', **trust)('image.png', return_tensors='pt')\n"
        "out = AutoModel.from_pretrained('.', **trust).eval()(**inputs)\n"
        "with mock.patch.object(auto_factory, 'hf_api'):\n"
        "    backbone = AutoBackbone.from_pretrained('.', out_indices=[2, 4], **trust).eval()\n"
        "torch.save([out.summary, out.adaptors['clip'].summary, *backbone(**inputs).feature_maps], 'out.pt')\n"
    )
    environment = {"PATH": "", "HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=folder)
    expected = student(**inputs, output_hidden_states=True)
    wanted = [expected.summary, expected.adaptors["clip"].summary, *expected.hidden_states[2::2]]
    for found, one in zip(torch.load(folder / "out.pt"), wanted, strict=True):
        torch.testing.assert_close(found, one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("stages.2.0.attention.proj.weight"), "weights are not in the checkpoint"),
        (lambda state: state.pop("stem.conv1.norm.running_var"), "weights are not in the checkpoint"),
        (lambda state: state.update({"stages.3.2.norm1.weight": torch.zeros(64)}), "have no place in this model"),
        (lambda state: state.update({"neck.convs.0.bias": torch.zeros(3)}), "have other shapes in the checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_the_configuration_s_is_refused(student, tmp_path, change, message):
    student.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        ERadioModel.from_pretrained(tmp_path)


def test_configurations_of_the_two_students_are_told_apart(folder, tmp_path):
    RadioConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'eradio', expected 'radio'.* as does ERadioModel"):
        RadioConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="model_type is 'radio', expected 'eradio'"):
        ERadioConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"AutoConfig.from_pretrained\(folder, out_indices"):
        RadioBackboneConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="expected a ERadioConfig, got a RadioConfig"):
        ERadioModel(RadioConfig.from_pretrained(tmp_path))


@torch.no_grad()
def test_heads_for_fewer_and_more_teachers_share_the_backbone(student):
    pixels = torch.rand(1, 3, 64, 64)
    expected = student(pixels)
    fewer = student.with_adaptors(["sam"])
    assert list(fewer(pixels).adaptors) == ["sam"]
    more = student.with_new_adaptors({"dino": {"summary_dim": 5, "feature_dim": 7, "hidden_dim": 16}})
    assert more(pixels).adaptors["dino"].features.shape == (1, 16, 7)
    for model in (fewer, more):
        assert model.stem.conv1.conv.weight.data_ptr() == student.stem.conv1.conv.weight.data_ptr()
        assert model.stem.conv1.norm.running_var.data_ptr() == student.stem.conv1.norm.running_var.data_ptr()
        assert torch.equal(model(pixels).adaptors["sam"].features, expected.adaptors["sam"].features)


def test_images_with_a_mask_and_attentions_are_refused(student):
    pixels = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match="takes no pixel_mask"):
        student(pixels, pixel_mask=torch.ones(1, 64, 64))
    with pytest.raises(ValueError, match="keeps no attention probabilities"):
        student(pixels, output_attentions=True)


def test_classification_and_segmentation_train_and_open_again(student, folder, tmp_path):
    pixels, expected = torch.rand(2, 3, 64, 96), {}
    for name, head_class, labels in (
        ("classes", ERadioForImageClassification, torch.tensor([0, 2])),
        ("places", ERadioForSemanticSegmentation, torch.randint(0, 3, (2, 64, 96))),
    ):
        model = head_class.from_pretrained(folder, num_labels=3)
        assert torch.equal(model.model.stem.conv2.conv.weight, student.stem.conv2.conv.weight)
        model.train()(pixels, labels=labels).loss.backward()
        assert model.model.stem.conv1.conv.weight.grad.abs().sum() > 0
        model.model.requires_grad_(False)
        assert not model.train().model.training  # frozen as a whole, its statistics rest
        model.eval().save_pretrained(tmp_path / name)
        expected[name] = model(pixels).logits
        torch.testing.assert_close(head_class.from_pretrained(tmp_path / name)(pixels).logits, expected[name])
        bare = ERadioModel.from_pretrained(tmp_path / name, adaptors={})
        torch.testing.assert_close(bare(pixels).summary, model.model(pixels).summary)
    opened = AutoModelForImageClassification.from_pretrained(tmp_path / "classes")
    assert type(opened) is ERadioForImageClassification and expected["places"].shape == (2, 3, 4, 6)


@torch.no_grad()
@pytest.mark.parametrize("neck", ["pixel_shuffle", None])
def test_the_backbone_s_maps_are_those_of_the_student(tmp_path, neck):
    student = build(neck=neck)
    student.save_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 64, 96)
    expected = student(pixels, output_hidden_states=True)
    features = student.features_to_grid(expected.features, 64, 96)
    maps = [*expected.hidden_states, features] if neck else [*expected.hidden_states[:4], features]
    default = ERadioBackbone.from_pretrained(tmp_path).eval()
    assert torch.equal(default(pixels).feature_maps[0], features)  # without a choice, what was distilled
    for indices in ([0], [1, 2], [1, 3], [2, 3, 4], list(range(len(maps)))):
        backbone = ERadioBackbone.from_pretrained(tmp_path, out_indices=indices).eval()
        found = backbone(pixels).feature_maps
        assert backbone.channels == [one.shape[1] for one in found]
        for one, index in zip(found, indices, strict=True):
            torch.testing.assert_close(one, maps[index])
        used = {name.split(".")[1] + name.split(".")[2] for name, _ in backbone.named_parameters()}
        assert ("stages3" in used) == (indices[-1] >= 4) and ("downsamples0" in used) == (indices[-1] >= 2)
    with pytest.raises(ValueError, match="'stage4' was not built"):
        backbone = ERadioBackbone(student.config, out_features=["stage2"])
        backbone.out_features = ["stage4"]
        backbone(pixels)


def test_no_weight_of_a_backbone_is_without_gradient(folder):
    backbone = ERadioBackbone.from_pretrained(folder, out_features=["stage2", "stage3"]).train()
    sum(one.square().sum() for one in backbone(torch.rand(2, 3, 64, 64)).feature_maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_rt_detr_takes_the_backbone_as_it_is(student, folder, tmp_path):
    config = RTDetrConfig(
        backbone_config=AutoConfig.from_pretrained(folder, out_features=["stage2", "stage3", "stage4"]),
        use_pretrained_backbone=False,
        freeze_backbone_batch_norms=False,
        encoder_in_channels=[16, 32, 64],
        feat_strides=[8, 16, 32],
        encoder_hidden_dim=32,
        encoder_ffn_dim=32,
        d_model=32,
        decoder_in_channels=[32, 32, 32],
        decoder_layers=1,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=2,
        num_denoising=0,
    )
    model = load_student(RTDetrForObjectDetection(config), folder)
    backbone = model.model.backbone.model
    assert type(backbone) is ERadioBackbone
    assert torch.equal(backbone.model.stem.conv1.conv.weight, student.stem.conv1.conv.weight)
    targets = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    pixels = torch.rand(2, 3, 96, 128)
    model.train()(pixel_values=pixels, labels=targets).loss.backward()
    assert backbone.model.stem.conv1.conv.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    again = RTDetrForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).pred_boxes, model(pixels).pred_boxes)


@torch.no_grad()
def test_uper_net_takes_four_maps(student, folder):
    backbone_config = ERadioConfig.from_pretrained(folder, out_indices=[1, 2, 3, 4])
    config = UperNetConfig(
        backbone_config=backbone_config, hidden_size=16, num_labels=3, auxiliary_in_channels=32, auxiliary_channels=8
    )
    model = load_student(UperNetForSemanticSegmentation(config), folder).eval()
    pixels = torch.rand(1, 3, 64, 96)
    expected = student(pixels, output_hidden_states=True).hidden_states[4]
    torch.testing.assert_close(model.backbone(pixels).feature_maps[3], expected)
    assert model(pixels).logits.shape == (1, 3, 64, 96)
    assert type(AutoBackbone.from_config(backbone_config)) is ERadioBackbone
    with pytest.raises(ValueError, match="window_size differ"):
        load_student(model, build(window_size=1))


@torch.no_grad()
def test_llava_sees_the_features(student, folder, tmp_path):
    tower = RadioVisionTower.from_radio(student)
    pixels = torch.rand(2, 3, 64, 96)
    expected = student(pixels, adaptors=[])
    out = tower(pixels, output_hidden_states=True)
    torch.testing.assert_close(out.last_hidden_state[:, 1:], expected.features)
    torch.testing.assert_close(out.last_hidden_state[:, 0], expected.summary)
    # images of different sizes, one sequence: each as if it were alone
    sizes = torch.tensor([[64, 32], [32, 96]])
    packed = tower(pixels, output_hidden_states=[-1], image_sizes=sizes).hidden_states[-1]
    alone = [student(pixels[:1, :, :, :32]).features, student(pixels[1:, :, :32]).features]
    torch.testing.assert_close(packed[:, 1:], torch.cat(alone, 1))
    with pytest.raises(ValueError, match="vision_feature_layer=-1"):
        tower(pixels, output_hidden_states=[-2])

    text = LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=10, pad_token_id=0
    )
    vision = RadioVisionTowerConfig.from_pretrained(folder, image_size=64)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=9, vision_feature_layer=-1)
    llava = load_student(LlavaForConditionalGeneration(config).eval(), folder)
    tokens = torch.tensor([[9] * 24 + [2, 5]])
    logits = llava(input_ids=tokens, pixel_values=pixels[:1]).logits
    llava.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert type(again.model.vision_tower.model) is ERadioModel
    torch.testing.assert_close(again(input_ids=tokens, pixel_values=pixels[:1]).logits, logits)
