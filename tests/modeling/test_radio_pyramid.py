"""ViTDet's simple pyramid over a student: its arithmetic by hand, and transformers' models that are built on it."""

import subprocess
import sys

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoBackbone, AutoConfig

from helpers.tiny_radio import build_with_adaptors
from transformers_radio import RadioModel, RadioPyramidBackbone, RadioPyramidConfig
from transformers_radio.modeling.pyramid_radio import RadioSimplePyramid


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    build_with_adaptors().save_pretrained(path)
    return path


def channel_norm(maps, norm):
    mean, variance = maps.mean(1, keepdim=True), maps.var(1, keepdim=True, correction=0)
    weight, bias = norm.weight[:, None, None], norm.bias[:, None, None]
    return (maps - mean) / (variance + norm.eps).sqrt() * weight + bias


def test_each_level_is_what_vitdet_says():
    torch.manual_seed(0)
    pyramid = RadioSimplePyramid(32, 16, [4, 8, 16, 32, 64], 12)
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    maps = torch.randn(2, 32, 4, 8)
    found = pyramid(maps)
    assert [tuple(one.shape) for one in found] == [(2, 12, int(4 * s), int(8 * s)) for s in (4, 2, 1, 0.5, 0.25)]

    def up(module, maps):  # a transposed convolution without overlap: each position becomes a 2x2 block
        blocks = torch.einsum("bchw,cdij->bdhiwj", maps, module.weight).flatten(2, 3).flatten(-2)
        return blocks + module.bias[:, None, None]

    first, norm, _, second, *_ = pyramid.levels[0]
    assert first.out_channels == 16 and second.out_channels == 8
    finest = up(second, F.gelu(channel_norm(up(first, maps), norm)))
    inputs = [finest, up(pyramid.levels[1][0], maps), maps]
    inputs += [F.max_pool2d(maps, 2), F.max_pool2d(maps, 4)]
    for level, into, out in zip(pyramid.levels, inputs, found, strict=True):
        one, one_norm, three, three_norm = list(level)[-4:]
        reduced = channel_norm(F.conv2d(into, one.weight), one_norm)
        expected = channel_norm(F.conv2d(reduced, three.weight, padding=1), three_norm)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_the_backbone_reads_a_student_and_its_last_features(folder, tmp_path):
    backbone = RadioPyramidBackbone.from_pretrained(folder, strides=[4, 8, 16, 32], pyramid_size=24).eval()
    assert backbone.channels == [24] * 4 and backbone.out_features == ["stride4", "stride8", "stride16", "stride32"]
    student = RadioModel.from_pretrained(folder).eval()
    pixels = torch.rand(2, 3, 64, 96)
    maps = backbone(pixels).feature_maps
    features = student.features_to_grid(student(pixels, adaptors=[]).features, 64, 96)
    assert torch.equal(backbone.pyramid.levels[0][1].weight, torch.ones(16))  # initialized, not garbage
    for found, expected in zip(maps, backbone.pyramid(features), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert backbone(pixels).hidden_states is None
    assert len(backbone(pixels, output_hidden_states=True).hidden_states) == 3

    backbone.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is RadioPyramidConfig and config.strides == [4, 8, 16, 32]
    again = RadioPyramidBackbone.from_pretrained(tmp_path).eval()
    for one, other in zip(again(pixels).feature_maps, maps, strict=True):
        assert torch.equal(one, other)


def test_windows_at_1024(folder):
    backbone = RadioPyramidBackbone.from_pretrained(folder, window_size=16, window_num_global=1).eval()
    student = RadioModel.from_pretrained(folder, window_num_global=1).eval()
    pixels = torch.rand(1, 3, 1024, 1024)
    with torch.no_grad():
        maps = backbone(pixels).feature_maps
        features = student(pixels, adaptors=[], window_size=16).features
        expected = backbone.pyramid(student.features_to_grid(features, 1024, 1024))
        global_features = student(pixels, adaptors=[]).features
    assert [tuple(one.shape[2:]) for one in maps] == [(128, 128), (64, 64), (32, 32)]
    torch.testing.assert_close(maps[1], expected[1], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(features, global_features)
    with pytest.raises(ValueError, match="window_size 16 does not divide"):
        backbone(torch.rand(1, 3, 96, 96))


def test_remote_code_of_a_saved_pyramid(folder, tmp_path):
    backbone = RadioPyramidBackbone.from_pretrained(folder).eval()
    backbone.save_pretrained(tmp_path / "pyramid")
    pixels = torch.rand(1, 3, 64, 64)
    torch.save(pixels, tmp_path / "in.pt")
    code = (
        "import sys, torch; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoConfig\n"
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module\n"
        "config = AutoConfig.from_pretrained('pyramid', trust_remote_code=True)\n"
        "cls = get_class_from_dynamic_module(config.auto_map['AutoBackbone'], 'pyramid')\n"
        "model = cls.from_pretrained('pyramid').eval()\n"
        "torch.save(list(model(torch.load('in.pt')).feature_maps), 'out.pt')\n"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    for found, expected in zip(torch.load(tmp_path / "out.pt"), backbone(pixels).feature_maps, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("strides", [[], [8, 8], [16, 8], [12], [5], [0], "8", [8.0]])
def test_strides_that_a_patch_does_not_give(folder, strides):
    with pytest.raises(ValueError, match="strides is"):
        RadioPyramidConfig.from_pretrained(folder, strides=strides)


def test_other_wrong_input_is_named(folder):
    with pytest.raises(ValueError, match="reshape_hidden_states is false"):
        RadioPyramidConfig.from_pretrained(folder, reshape_hidden_states=False)
    backbone = RadioPyramidBackbone.from_pretrained(folder)
    with pytest.raises(ValueError, match="48x64 pixels, but the largest stride is 32"):
        backbone(torch.rand(1, 3, 48, 64))
    assert isinstance(AutoBackbone.from_config(backbone.config), RadioPyramidBackbone)
    with pytest.raises(ValueError, match="expected a RadioPyramidConfig, got a ResNetConfig"):
        RadioPyramidBackbone(transformers.ResNetConfig())
