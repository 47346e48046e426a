"""docs/use_it_in.md, as it stands: its examples run one after the other on small models of the names that it uses."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import transformers_radio
from helpers.paths import ROOT
from helpers.tiny_llava import tiny_tokenizer
from transformers_radio import RadioConfig, RadioImageProcessor, RadioModel
from transformers_radio.teachers import load_sam

TEACHERS = Path(transformers_radio.__file__).parent / "quickstart" / "teachers"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The current folder, with the student, the LLaVA and the SAM that the page names."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shutil.copy(TEACHERS / "sam" / "sam.pth", "sam_vit_h.pth")
    width = load_sam("sam_vit_h.pth").image_encoder.neck[0].in_channels
    clip = {"summary_dim": 128, "feature_dim": 192, "hidden_dim": 16, "teacher": f"open_clip:{TEACHERS / 'clip'}"}
    adaptors = {"clip": clip, "sam": {"summary_dim": None, "feature_dim": width, "hidden_dim": 16}}
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2.0}
    config = RadioConfig(**sizes, max_img_size=128, preferred_resolution=64, window_num_global=1, adaptors=adaptors)
    RadioModel(config).save_pretrained("runs/mine/student")
    RadioImageProcessor().save_pretrained("runs/mine/student")

    words = tiny_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<unk>"})
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**{**text, "image_size": 28, "patch_size": 14})
    language = LlamaConfig(**text, num_key_value_heads=2, vocab_size=len(words))
    image = words.convert_tokens_to_ids("<image>")
    llava = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=language, image_token_index=image)
    )
    llava.save_pretrained("llava-hf/llava-1.5-7b-hf")
    LlavaProcessor(CLIPImageProcessor(), words, patch_size=14).save_pretrained("llava-hf/llava-1.5-7b-hf")


def test_the_page_works_as_it_stands(world):
    pytest.importorskip("peft")
    pytest.importorskip("onnxruntime")
    text = (ROOT / "docs" / "use_it_in.md").read_text(encoding="utf-8")
    names = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(example, names)
    student = RadioModel.from_pretrained("runs/mine/student")
    weight = student.embeddings.patch_projection.weight
    for model in (names["segmenter"].backbone.model, names["detector"].backbone.student):
        assert torch.equal(model.embeddings.patch_projection.weight, weight)
    assert names["masks"].shape == (3, 60, 80) and names["probabilities"].shape == (1, 2)
    tower = names["build_vision_tower"](SimpleNamespace(mm_vision_tower="runs/mine/student"), delay_load=False)
    assert tower.num_patches == 16 and torch.equal(tower.vision_tower.model.embeddings.patch_projection.weight, weight)
    again = LlavaForConditionalGeneration.from_pretrained("llava-radio")
    assert torch.equal(again.model.vision_tower.model.embeddings.patch_projection.weight, weight)
    assert (Path("llava-radio") / "processor_config.json").exists()
    assert len(names["lora"].peft_config) == 1 and names["merged"].config.adaptors == student.config.adaptors
    again = RadioModel.from_pretrained("runs/mine/student-lora")
    assert torch.equal(again.embeddings.patch_projection.weight, weight)
    with torch.no_grad():
        expected = student.eval()(torch.from_numpy(names["images"]))
    for found, wanted in ((names["features"], expected.features), (names["clip"], expected.adaptors["clip"].summary)):
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)
    assert len(names["parity"]) == 3 * 4 and max(row.error for row in names["parity"]) < 1e-4
