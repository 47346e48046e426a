"""E-RADIO's released layout against a plain forward pass."""

import pytest
import torch

from helpers import nvidia_reference as reference
from helpers.nvidia_eradio import WINDOW, eradio, make_eradio
from helpers.nvidia_files import write_hub, write_pth
from transformers_radio import ERadioModel
from transformers_radio.hub.convert import load_nvidia_checkpoint
from transformers_radio.hub.folder import convert

TABLE = "base_model.levels.2.blocks.0.attention_blocks.0.attn.pos_emb_funct.relative_bias"


@pytest.fixture(scope="module")
def made():
    return make_eradio()


def in_hub_layout(stored):
    names = {"base_model.": "radio_model.model.", "input_conditioner.": "radio_model.input_conditioner."}
    # the loader registers it for every model; nothing reads it here
    return {"radio_model.summary_idxs": torch.tensor([0, 1])} | {
        new + key.removeprefix(old): value
        for key, value in stored.items()
        for old, new in names.items()
        if key.startswith(old)
    }


@torch.no_grad()
def test_it_computes_what_its_tensors_say(tmp_path, made):
    args, stored, plain, heads = made
    model = load_nvidia_checkpoint(write_pth(tmp_path / "e-radio_v2.pth.tar", args, stored))
    assert isinstance(model, ERadioModel) and model.config.window_size == WINDOW
    assert model.config.depths == [2, 1, 1, 2] and model.config.num_heads == [2, 4]
    images = torch.rand(2, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    out, features = model(images), eradio(plain, images)
    torch.testing.assert_close(out.features, features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.summary, features.mean(1), atol=1e-4, rtol=1e-4)
    for name, (summary, dense) in heads.items():
        head = out.adaptors[name]
        torch.testing.assert_close(head.features, reference.head(dense, features), atol=1e-4, rtol=1e-4)
        if name == "sam":
            assert head.summary is None
        else:
            torch.testing.assert_close(head.summary, reference.head(summary, features.mean(1)), atol=1e-4, rtol=1e-4)
    assert "non-commercial" in model.config.converted_from["license"]


@torch.no_grad()
def test_the_hub_layout_and_the_automatic_window(tmp_path, made):
    args, stored, plain, _ = made
    folder = write_hub(tmp_path / "E-RADIO", {**args, "cpe_max_size": 2048}, in_hub_layout(stored), "e-radio_v2")
    convert(str(folder), tmp_path / "converted")
    model = ERadioModel.from_pretrained(tmp_path / "converted").eval()
    images = torch.rand(1, 3, 128, 128)
    torch.testing.assert_close(model(images).features, eradio(plain, images), atol=1e-4, rtol=1e-4)
    model.config.window_size = None  # chosen by the size of the image: here 4 as well, at 64 pixels 2
    assert model.window_for(128, 128) == WINDOW and model.window_for(64, 64) == 2


def test_a_norm_that_would_be_lost_and_other_tensors_are_refused(tmp_path, made):
    args, stored, *_ = made
    for extra, value, named in (
        ({"base_model.levels.0.blocks.gamma": torch.ones(8)}, {}, "levels.0.blocks.gamma"),
        ({}, {"model_norm": True}, "args.model_norm"),
        ({}, {"model": "vit_base_patch16_224"}, "E-RADIO"),
        ({"_feature_normalizer.mean": torch.ones(64)}, {}, "feature normalizer"),
        ({TABLE: torch.ones(1, 2, 64, 64)}, {}, r"windows of \[4, 8\] places"),
        ({"base_model.patch_embed.conv_down.0.bn.running_var": torch.full((6,), torch.nan)}, {}, "var holds NaN"),
    ):
        path = write_pth(tmp_path / "e-radio_v2.pth.tar", {**args, **value}, {**stored, **extra})
        with pytest.raises(ValueError, match=named):
            load_nvidia_checkpoint(path)
    with pytest.raises(ValueError, match="only a RADIO ViT is written in this layout"):
        convert(str(write_pth(tmp_path / "e-radio_v2.pth.tar", args, stored)), tmp_path / "out", "nvidia")
    assert not (tmp_path / "out").exists()
