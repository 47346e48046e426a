"""Text towers against the full models of transformers, from the files that transformers writes."""

import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
)

from transformers_radio.teachers import load_text_encoder
from transformers_radio.teachers.transformers.siglip import canonicalize_text

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**TOWER, "vocab_size": 30, "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 2}
VISION = {**TOWER, "patch_size": 8}
SIGLIP_VOCABULARY = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"acdeghilnoprst"]
PROMPTS = ["a red cat", "A Photo_of a  CAT.", "it's the ship, done!", "one\tlong text without an end, as there are"]


def make_siglip(folder, kind, randomize):
    """A tiny SigLIP or SigLIP2 with a tokenizer of the class that SigLIP2's checkpoints get."""
    config, model, size = {
        "siglip": (SiglipConfig, SiglipModel, {"image_size": 16}),
        "siglip2": (Siglip2Config, Siglip2Model, {"num_patches": 4}),
    }[kind]
    model = randomize(model(config(text_config=TEXT, vision_config={**VISION, **size})))
    model.save_pretrained(folder)
    vocabulary = {token: index for index, token in enumerate(SIGLIP_VOCABULARY)}
    Siglip2Tokenizer(vocabulary, [], add_bos_token=False, add_eos_token=True).save_pretrained(folder)
    return model


def make_clip(folder, randomize, projection_dim=20):
    text = {**TEXT, "vocab_size": 6, "eos_token_id": 1}
    vision = {**VISION, "image_size": 16}
    model = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "red": 3, "cat": 4, "a": 5}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
@torch.no_grad()
def test_siglip_is_the_full_model_on_canonical_padded_text(kind, tmp_path, randomize):
    model = make_siglip(tmp_path, kind, randomize)
    ids = torch.zeros(len(PROMPTS), 12, dtype=torch.int64)  # padded with <pad> on the right
    for row, text in enumerate(
        ["a red cat", "a photo of a cat", "its the ship done", "one long text without an end as there are"]
    ):
        tokens = ["▁" if letter == " " else letter if letter in SIGLIP_VOCABULARY else "<unk>" for letter in text]
        fused = [token for at, token in enumerate(tokens) if token != "<unk>" or tokens[at - 1 : at] != ["<unk>"]]
        numbers = [SIGLIP_VOCABULARY.index(token) for token in fused][:11] + [1]
        ids[row, : len(numbers)] = torch.tensor(numbers)
    expected = model.get_text_features(input_ids=ids).pooler_output
    encode = load_text_encoder("transformers", str(tmp_path))
    torch.testing.assert_close(encode(PROMPTS), expected)
    many = encode(PROMPTS * 70)  # more than one batch
    torch.testing.assert_close(many, expected.repeat(70, 1))
    assert many.dtype == torch.float32 and not encode.training
    # Left to itself this tokenizer pads on the left, which gives another embedding.
    alone = encode.tokenizer(["a red cat"], padding="max_length", max_length=12, return_tensors="pt").input_ids
    assert alone[0, 0] == 0
    assert (model.get_text_features(input_ids=alone).pooler_output - expected[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("projection_dim", [20, 512])  # 512 is the default of the text part alone
@torch.no_grad()
def test_clip_is_the_full_model(projection_dim, tmp_path, randomize):
    model = make_clip(tmp_path, randomize, projection_dim)
    ids = torch.tensor([[5, 3, 4, 1], [4, 1, 0, 0]])
    expected = model.get_text_features(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
    encode = load_text_encoder("transformers", str(tmp_path))
    assert expected.shape == (2, projection_dim)
    torch.testing.assert_close(encode(["a red cat", "cat"]), expected)


@pytest.mark.parametrize("text", [*PROMPTS, "a bad photo of a {}.", "  St. Bernard (dog), «schön» – snake_case  "])
def test_canonical_text_is_open_clips(text):
    assert canonicalize_text(text) == open_clip.tokenizer.canonicalize_text(text)


@pytest.mark.parametrize("kind", ["siglip", "siglip2", "clip"])
def test_the_image_tower_is_not_there(kind, tmp_path, randomize):
    model = make_clip(tmp_path, randomize) if kind == "clip" else make_siglip(tmp_path, kind, randomize)
    encode = load_text_encoder("transformers", str(tmp_path))
    expected = {name: value for name, value in model.state_dict().items() if name.startswith("text_")}
    assert sum(p.numel() for p in encode.parameters()) == sum(value.numel() for value in expected.values())
    assert not any("vision" in name or "visual" in name for name, _ in encode.named_modules())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_the_image_tower_does_not_pass_through_memory(tmp_path):
    """The peak of memory rises by the text tower (220 MB) and not by the image tower (540 MB) as well."""
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 8}
    config = SiglipConfig(
        text_config={**wide, "num_hidden_layers": 1, "vocab_size": 30, "max_position_embeddings": 8},
        vision_config={**wide, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
    )
    SiglipModel(config).save_pretrained(tmp_path)
    Siglip2Tokenizer({token: index for index, token in enumerate(SIGLIP_VOCABULARY)}, []).save_pretrained(tmp_path)
    code = f"""
from pathlib import Path
from transformers import SiglipModel
from transformers_radio.teachers import load_text_encoder

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
encode = load_text_encoder("transformers", {str(tmp_path)!r})
encode(["a cat"])  # weights are read from the file when they are used
print(sum(p.numel() * p.element_size() for p in encode.parameters()), memory("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    text_tower, rise = map(int, run.stdout.split())
    assert os.path.getsize(tmp_path / "model.safetensors") > 3 * text_tower
    assert 0.5 * text_tower < rise < 1.4 * text_tower


def test_what_cannot_be_used_is_named(tmp_path, randomize):
    make_siglip(tmp_path, "siglip", randomize)
    weights = load_file(tmp_path / "model.safetensors")
    bias = weights.pop("text_model.head.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys.*head.bias"):
        load_text_encoder("transformers", str(tmp_path))
    save_file({**weights, "text_model.head.bias": bias}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="list of at least one string"):
        load_text_encoder("transformers", str(tmp_path))("a cat")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_text_encoder("transformers", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="is a DinoTeacher, which has no text tower"):
        load_text_encoder("transformers", str(tmp_path))
