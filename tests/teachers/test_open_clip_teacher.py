"""OpenCLIP teachers against OpenCLIP's own forward, from OpenCLIP's own file formats."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from transformers_radio.teachers import build_teacher, load_text_encoder

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
TIMM = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "map", "timm_proj": "none", "image_size": 224}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


@pytest.fixture
def make_folder(tmp_path, randomize):
    """Save a tiny OpenCLIP model as OpenCLIP's local-dir; returns (folder, the model that was saved)."""

    def make(vision, weights="open_clip_model.safetensors", **model):
        model_cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, **model}
        folder = tmp_path / "clip"
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS})
        )
        kind = open_clip.CustomTextCLIP if model.get("custom_text") else open_clip.CLIP
        original = randomize(kind(**{k: v for k, v in model_cfg.items() if k != "custom_text"}))
        state = {name: tensor.contiguous() for name, tensor in original.state_dict().items()}
        if weights.endswith(".safetensors"):
            save_file(state, folder / weights)
        else:
            torch.save(state, folder / weights)
        return folder, original

    return make


def normalised(batch, mean=PREPROCESS["mean"], std=PREPROCESS["std"]):
    return (batch - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def last_block_tokens(visual, pixel_values):
    """What the last block returns, caught by a hook on the original model."""
    caught = []
    handle = visual.transformer.resblocks[-1].register_forward_hook(lambda *a: caught.append(a[2]))
    visual(pixel_values)
    handle.remove()
    return caught[0][:, 1:]


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@torch.no_grad()
def test_vit(make_folder, images, assert_contract, weights):
    folder, original = make_folder(VIT, weights, quick_gelu=True)
    teacher = build_teacher("open_clip", str(folder))
    assert (teacher.summary_dim, teacher.feature_dim, teacher.image_size, teacher.patch_size) == (24, 48, 32, 8)
    with torch.enable_grad():
        output = assert_contract(teacher)
    batch = normalised(images(32))
    assert output.grid == (4, 4)
    torch.testing.assert_close(output.summary, original.encode_image(batch))
    torch.testing.assert_close(output.features, last_block_tokens(original.visual, batch))
