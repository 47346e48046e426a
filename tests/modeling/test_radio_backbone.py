"""RadioBackbone against transformers' own RADIO hidden states, and inside transformers' segmenters and detectors."""

import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from transformers_radio.modeling.configuration_radio import RadioConfig
from transformers_radio.modeling.configuration_radio_backbone import RadioBackboneConfig
from transformers_radio.modeling.image_processing_radio import RadioImageProcessor
from transformers_radio.modeling.modeling_radio import RadioModel
from transformers_radio.modeling.modeling_radio_heads import RadioBackbone


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("student")
    adaptor = {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16, "summary_token": 0, "teacher": "clip"}
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "max_img_size": 128}
    config = RadioConfig(**shape, num_cls_tokens=2, num_registers=1, adaptors={"clip": adaptor})
    RadioModel(config).save_pretrained(folder)
    return folder


def environment(tmp_path, **extra):
    return {
        "PATH": "",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def uper_net(student_folder) -> UperNetForSemanticSegmentation:
    torch.manual_seed(1)
    backbone_config = RadioBackboneConfig.from_pretrained(student_folder, out_indices=[1, 2, 3, 4])
    config = UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=16,
        num_labels=3,
        auxiliary_in_channels=32,
        auxiliary_channels=8,
        use_auxiliary_head=True,
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone = RadioBackbone.from_pretrained(student_folder, config=backbone_config)
    return model


def test_feature_maps_are_the_native_hidden_states_as_grids(student_folder):
    native = transformers.RadioModel.from_pretrained(student_folder).eval()
    pixel_values = torch.rand(2, 3, 32, 64)
    expected = native(pixel_values, output_hidden_states=True)
    backbone = RadioBackbone.from_pretrained(student_folder, out_features=["stem", "stage2", "stage4"]).eval()
    assert backbone.out_indices == [0, 2, 4] and backbone.channels == [32, 32, 32]
    output = backbone(pixel_values, output_hidden_states=True)
    assert len(output.feature_maps) == 3
    for feature_map, index in zip(output.feature_maps, [0, 2, 4], strict=True):
        assert feature_map.shape == (2, 32, 2, 4)
        patches = expected.hidden_states[index][:, 3:]  # after 2 CLS tokens and 1 register
        # row-major: patch 4 * y + x lies at (y, x)
        torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), patches)
    torch.testing.assert_close(output.feature_maps[-1][:, :, 1, 2], expected.features[:, 6])
    assert len(output.hidden_states) == 5 and output.hidden_states[0].shape == (2, 11, 32)
    assert backbone(pixel_values).hidden_states is None


def test_the_last_map_has_the_final_norm_of_a_student_that_has_one():
    config = RadioBackboneConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, max_img_size=128, final_norm=True
    )
    backbone = RadioBackbone(config).eval()
    torch.nn.init.uniform_(backbone.model.norm.weight)
    pixel_values = torch.rand(1, 3, 32, 48)
    features = backbone.model(pixel_values).features
    assert torch.equal(backbone(pixel_values).feature_maps[0].flatten(2).transpose(1, 2), features)


def test_config_defaults_to_the_last_stage_and_survives_saving(tmp_path, student_folder, caplog):
    config = RadioBackboneConfig.from_pretrained(student_folder)
    assert config.out_features == ["stage4"] and config.out_indices == [4]
    assert "model of type" not in caplog.text  # a student's folder is what it is meant for
    assert not hasattr(config, "auto_map")  # would send AutoModel to the student's class
    RadioBackboneConfig.from_pretrained(student_folder, out_indices=[0, 3]).save_pretrained(tmp_path)
    again = RadioBackboneConfig.from_pretrained(tmp_path)
    assert again.out_features == ["stem", "stage3"] and again.stage_names[-1] == "stage4"


@pytest.mark.parametrize("options", [{"out_features": ["layer1"]}, {"out_indices": [3, 1]}, {"out_indices": [9]}])
def test_wrong_stages_are_named(student_folder, options):
    with pytest.raises((ValueError, IndexError)):
        RadioBackboneConfig.from_pretrained(student_folder, **options)


def test_wrong_size_is_named(student_folder):
    with pytest.raises(ValueError, match="40"):
        RadioBackbone.from_pretrained(student_folder)(torch.rand(1, 3, 32, 40))


def test_auto_backbone_knows_the_type_and_leaves_the_native_type_alone(student_folder):
    config = RadioBackboneConfig.from_pretrained(student_folder)
    assert type(AutoBackbone.from_config(config)) is RadioBackbone
    assert type(transformers.AutoConfig.from_pretrained(student_folder)) is transformers.RadioConfig


def test_inside_a_segmenter_it_trains_and_survives_saving(tmp_path, student_folder):
    model = uper_net(student_folder).train()
    pixel_values = torch.rand(2, 3, 64, 96)
    labels = torch.randint(0, 3, (2, 64, 96))
    model(pixel_values, labels=labels).loss.backward()
    assert model.backbone.model.embeddings.patch_projection.weight.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path / "upernet")
    again, info = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "upernet", output_loading_info=True)
    assert type(again.backbone) is RadioBackbone and not info["missing_keys"] and not info["unexpected_keys"]
    logits = model(pixel_values).logits
    assert logits.shape == (2, 3, 64, 96)
    torch.testing.assert_close(again.eval()(pixel_values).logits, logits)

    # in another process one import of ours is enough
    torch.save(pixel_values, tmp_path / "in.pt")
    code = (
        "import torch\n"
        "from transformers_radio.modeling import RadioBackbone\n"
        "from transformers import UperNetForSemanticSegmentation\n"
        "model = UperNetForSemanticSegmentation.from_pretrained('upernet').eval()\n"
        "torch.save(model(torch.load('in.pt')).logits, 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(tmp_path), cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), logits)


def test_inside_a_detector_with_padded_images(student_folder):
    torch.manual_seed(0)
    config = DetrConfig(
        backbone_config=RadioBackboneConfig.from_pretrained(student_folder),
        use_timm_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=2,
    )
    model = DetrForObjectDetection(config).eval()
    images = [torch.rand(3, 50, 100), torch.rand(3, 100, 70)]
    inputs = RadioImageProcessor(size={"longest_edge": 96})(images, return_tensors="pt")
    targets = [
        {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])},
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2]])},
    ]
    output = model(**inputs, labels=targets)
    assert output.pred_boxes.shape == (2, 5, 4)
    output.loss.backward()
    assert model.model.backbone.model.model.embeddings.patch_projection.weight.grad.abs().sum() > 0


def test_loads_as_remote_code_in_a_process_without_our_package(tmp_path, student_folder):
    backbone = RadioBackbone.from_pretrained(student_folder, out_indices=[2, 4]).eval()
    backbone.save_pretrained(tmp_path / "backbone")
    pixel_values = torch.rand(1, 3, 32, 48)
    torch.save(pixel_values, tmp_path / "in.pt")
    # AutoBackbone.from_pretrained of transformers asks the Hub whether the name exists, so a folder cannot go through
    # it; from_config registers the class of the folder, whose weights are then loaded like any other model's
    code = (
        "import sys, torch; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoBackbone, AutoConfig\n"
        "config = AutoConfig.from_pretrained('backbone', trust_remote_code=True)\n"
        "backbone = AutoBackbone.from_config(config, trust_remote_code=True)\n"
        "backbone = type(backbone).from_pretrained('backbone', config=config).eval()\n"
        "torch.save(backbone(torch.load('in.pt')).feature_maps, 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(tmp_path), cwd=tmp_path)
    for loaded, expected in zip(torch.load(tmp_path / "out.pt"), backbone(pixel_values).feature_maps, strict=True):
        torch.testing.assert_close(loaded, expected)
