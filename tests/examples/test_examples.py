"""Each example at tiny size: the accuracy that its docstring states, and what it writes opens elsewhere."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from helpers.striped_images import NAMES, SIDE, save_student, write_classes, write_regions
from transformers_radio import RadioConfig, RadioForImageClassification, RadioImageProcessor, RadioModel

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("classes") / "images")


def test_classification(student, classes, tmp_path):
    arguments = [str(student), str(classes), "--output", str(tmp_path), "--steps", "60", "--learning-rate", "3e-3"]
    metrics = example("finetune_classification").main(arguments)
    assert metrics["eval_accuracy"] > 0.9
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    assert sorted(model.config.label2id) == sorted(NAMES)
    processor = RadioImageProcessor.from_pretrained(tmp_path)
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    name = sorted(NAMES)[0]
    images = [Image.open(path) for path in sorted((classes / "test" / name).iterdir())]
    assert sum(found[0]["label"] == name for found in classify(images)) > 0.8 * len(images)


def test_segmentation(student, tmp_path):
    scenes = write_regions(tmp_path / "scenes")
    options = ["--classes", "3", "--size", "64", "--steps", "80", "--learning-rate", "3e-3", "--all"]
    arguments = [str(student), str(scenes), "--output", str(tmp_path / "model"), *options]
    metrics = example("finetune_segmentation").main(arguments)
    assert metrics["eval_miou"] > 90
    folder = tmp_path / "model"
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
    segment = transformers.pipeline(
        "image-segmentation", model=model, image_processor=RadioImageProcessor.from_pretrained(folder)
    )
    assert {part["label"] for part in segment(Image.open(scenes / "test" / "0.png"))} <= {
        f"LABEL_{i}" for i in range(3)
    }


def test_lora_keeps_the_adaptors_and_merges(student, classes, tmp_path):
    peft = pytest.importorskip("peft")
    arguments = [str(student), str(classes), "--output", str(tmp_path), "--steps", "60", "--learning-rate", "1e-2"]
    metrics = example("finetune_lora").main(arguments)
    assert metrics["eval_accuracy"] > 0.75
    before, merged = RadioModel.from_pretrained(student), RadioModel.from_pretrained(tmp_path / "student")
    weights, new = before.state_dict(), merged.state_dict()
    changed = {name for name in weights if not torch.equal(weights[name], new[name])}
    assert changed == {
        name
        for name in weights
        if ".layer." in name
        and name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "fc1.weight", "fc2.weight")
        )
    }
    assert list(merged.adaptors) == ["clip"]
    # reloaded beside a fresh base, the adapter computes what the merged student computes
    base = RadioForImageClassification.from_pretrained(student, num_labels=4)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        found = tuned.get_base_model().model(images)
        expected = merged.eval()(images)
    torch.testing.assert_close(found.summary, expected.summary, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.features, expected.features, rtol=1e-4, atol=1e-4)


def wrapped_by(student, targets):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(RadioModel.from_pretrained(student), peft.LoraConfig(target_modules=targets))
    layers = (name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer))
    return {name.removeprefix("base_model.model.") for name in layers}


def test_short_names_and_all_linear_wrap_the_adaptors_too(student):
    linear = {
        name
        for name, module in RadioModel.from_pretrained(student).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert wrapped_by(student, "all-linear") == linear
    assert any(name.startswith("adaptors.clip.") for name in wrapped_by(student, ["fc1", "fc2"]))
    found = wrapped_by(student, example("finetune_lora").TARGETS)
    assert found == {name for name in linear if name.startswith("encoder.layer.")}
    assert len(found) == 2 * 6


def test_the_expression_matches_gated_mlps(tmp_path):
    """Of RADIOv2.5-g, and not the norm inside of the plain MLP, which LoRA could not wrap."""
    fields = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, patch_size=8, max_img_size=64)
    for index, (variant, count) in enumerate((({"use_swiglu_ffn": True}, 2 * 7), ({"mlp_norm": True}, 2 * 6))):
        RadioModel(RadioConfig(**fields, **variant)).save_pretrained(tmp_path / str(index))
        found = wrapped_by(tmp_path / str(index), example("finetune_lora").TARGETS)
        assert len(found) == count and all(name.startswith("encoder.layer.") for name in found)
