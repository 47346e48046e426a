"""Saved folders in fresh processes: as remote code without this package, and with it through the Auto classes."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from transformers_radio import (
    RadioBackbone,
    RadioBackboneConfig,
    RadioConfig,
    RadioImageProcessor,
    RadioLlavaProcessor,
    RadioModel,
    RadioVisionTower,
    RadioVisionTowerConfig,
    load_student,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    adaptors = {"clip": {"summary_dim": 8, "feature_dim": 12, "hidden_dim": 16}}
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "max_img_size": 128}
    RadioModel(RadioConfig(**shape, num_cls_tokens=2, num_registers=1, adaptors=adaptors)).save_pretrained(
        folder / "student"
    )
    RadioImageProcessor(size={"longest_edge": 96}).save_pretrained(folder / "student")
    generator = torch.Generator().manual_seed(0)
    for name, size in (("wide", (120, 60)), ("tall", (50, 100))):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}.png")
    return folder


def run(folder, code):
    environment = {"PATH": "", "HOME": str(folder), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=folder)
    return torch.load(folder / "out.pt")


def test_remote_code_needs_no_package(folder):
    student = RadioModel.from_pretrained(folder / "student").eval()
    backbone = RadioBackbone.from_pretrained(folder / "student", out_indices=[2, 4]).eval()
    backbone.save_pretrained(folder / "backbone")
    tower = RadioVisionTower.from_radio(student)
    tower.save_pretrained(folder / "tower")
    # AutoBackbone asks the Hub whether the name exists before it looks at a folder: here the Hub says yes
    found = run(
        folder,
        "import sys, torch; from unittest import mock; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoBackbone, AutoImageProcessor, AutoModel\n"
        "from transformers.models.auto import auto_factory\n"
        "trust = {'trust_remote_code': True}\n"
        "processor = AutoImageProcessor.from_pretrained('student', **trust)\n"
        "inputs = processor(['wide.png', 'tall.png'], return_tensors='pt')\n"
        "student = AutoModel.from_pretrained('student', **trust).eval()\n"
        "tower = AutoModel.from_pretrained('tower', **trust).eval()\n"
        "with mock.patch.object(auto_factory, 'hf_api'):\n"
        "    maps = AutoBackbone.from_pretrained('backbone', **trust).eval()(**inputs).feature_maps\n"
        "    other = AutoBackbone.from_pretrained('student', out_indices=[1], **trust).eval()\n"
        "other.save_pretrained('again')\n"
        "processor.save_pretrained('again')\n"
        "out = {'inputs': dict(inputs), 'summary': student(**inputs).summary, 'maps': maps,\n"
        "       'other': other(**inputs).feature_maps,\n"
        "       'tower': tower(inputs.pixel_values).last_hidden_state}\n"
        "torch.save(out, 'out.pt')\n",
    )
    inputs = RadioImageProcessor.from_pretrained(folder / "student")(
        [folder / "wide.png", folder / "tall.png"], return_tensors="pt"
    )
    assert found["inputs"].keys() == inputs.keys() and torch.equal(
        found["inputs"]["pixel_values"], inputs.pixel_values
    )
    torch.testing.assert_close(found["summary"], student(**inputs).summary)
    torch.testing.assert_close(found["maps"], backbone(**inputs).feature_maps)
    first = RadioBackbone.from_pretrained(folder / "student", out_indices=[1]).eval()
    torch.testing.assert_close(found["other"], first(**inputs).feature_maps)
    again = RadioBackbone.from_pretrained(folder / "again").eval()
    torch.testing.assert_close(again(**inputs).feature_maps, found["other"])
    assert (folder / "again" / "image_processing_radio.py").exists()
    torch.testing.assert_close(found["tower"], tower(inputs.pixel_values).last_hidden_state)


def test_larger_models_open_with_one_import(folder):
    torch.manual_seed(1)
    backbone_config = RadioBackboneConfig.from_pretrained(folder / "student", out_indices=[1, 2, 3, 4])
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8}
    segmenter = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone_config, **sizes))
    load_student(segmenter, folder / "student").eval().save_pretrained(folder / "upernet")
    text_config = LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=10, pad_token_id=0
    )
    vision_config = RadioVisionTowerConfig.from_pretrained(folder / "student")
    config = LlavaConfig(vision_config=vision_config, text_config=text_config, image_token_index=9)
    llava = load_student(LlavaForConditionalGeneration(config), folder / "student").eval()
    llava.save_pretrained(folder / "llava")
    vocabulary = {"<pad>": 0, "what": 2, "<unk>": 5, "<image>": 9}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = RadioLlavaProcessor(
        RadioImageProcessor.from_pretrained(folder / "student"),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder / "llava")
    inputs = processor(images=[folder / "wide.png"], text="<image> what", return_tensors="pt")
    found = run(
        folder,
        "import torch\n"
        "from transformers import AutoProcessor, LlavaForConditionalGeneration, UperNetForSemanticSegmentation\n"
        "import transformers_radio\n"
        "processor = AutoProcessor.from_pretrained('llava')\n"
        "inputs = processor(images=['wide.png'], text='<image> what', return_tensors='pt')\n"
        "llava = LlavaForConditionalGeneration.from_pretrained('llava').eval()\n"
        "segmenter = UperNetForSemanticSegmentation.from_pretrained('upernet').eval()\n"
        "out = {'inputs': dict(inputs), 'logits': llava(**inputs).logits,\n"
        "       'maps': segmenter(inputs.pixel_values).logits}\n"
        "torch.save(out, 'out.pt')\n",
    )
    assert found["inputs"].keys() == inputs.keys() and torch.equal(found["inputs"]["input_ids"], inputs["input_ids"])
    torch.testing.assert_close(found["logits"], llava(**inputs).logits)
    torch.testing.assert_close(found["maps"], segmenter(inputs["pixel_values"]).logits)
