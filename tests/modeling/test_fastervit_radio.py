"""FasterViT students against the networks of its own package."""

import copy
import subprocess
import sys

import pytest
import timm
import torch

from helpers.tiny_radio import scramble
from transformers_radio import RadioTimmConfig, RadioTimmModel

fastervit = pytest.importorskip("fastervit")

TINY = {"dim": 16, "in_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}
SIDE = 128


def build(**fields):
    torch.manual_seed(0)
    adaptors = {"clip": {"summary_dim": 8, "feature_dim": 4, "hidden_dim": 16}}
    fields = {"timm_model": "faster_vit_0_any_res", "model_args": TINY, "image_size": SIDE, **fields}
    return scramble(RadioTimmModel(RadioTimmConfig(adaptors=adaptors, **fields)))


@pytest.fixture
def images():
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_outputs_are_those_of_the_package(images):
    model = build().eval()
    own = fastervit.create_model("faster_vit_0_any_res", num_classes=0, resolution=SIDE, **TINY).eval()
    found = own.load_state_dict(model.network.state_dict(), strict=False)
    assert not found.unexpected_keys and all("global_tokenizer.pos_embed" in key for key in found.missing_keys)
    mean, std = (torch.tensor(own.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    final = own.forward_features((images - mean) / std)  # (B, D, h, w)
    output = model(images, output_hidden_states=True)
    torch.testing.assert_close(output.features, final.flatten(2).mT)
    torch.testing.assert_close(output.summary, own.forward_head(final))
    assert [maps.shape[1:] for maps in output.hidden_states] == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (128, 4, 4)]
    torch.testing.assert_close(own.norm(output.hidden_states[-1]), final)
    assert len(model.blocks) == 5 and model.summary_dim == 128


@torch.no_grad()
def test_an_earlier_stage_and_intermediates(images):
    model, earlier = build().eval(), build(feature_stride=16).eval()
    earlier.load_state_dict({**model.state_dict(), **{k: v for k, v in earlier.state_dict().items() if "clip" in k}})
    found = earlier(images)
    stages = model(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.features, stages[1].flatten(2).mT)
    maps = model.forward_intermediates(images, indices=[1, 3], norm=True, intermediates_only=True)
    torch.testing.assert_close(maps[0], stages[1])
    torch.testing.assert_close(maps[1].flatten(2).mT, model(images).features)
    early = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], stages[0])


def test_copies_stand_alone(images):
    model = build().eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.network.patch_embed.conv_down[0].weight.zero_()
        _, maps = twin.network.forward_intermediates(images)
        assert maps[0].std() > 0.1 * images.std()


def test_a_model_in_training_can_be_copied(images):
    model = build().train()
    model(images).summary.square().sum().backward()
    twin = copy.deepcopy(model)
    assert not any(buffer.requires_grad for buffer in twin.buffers())
    twin(images).summary.square().sum().backward()  # of its own weights
    bias = model.network.levels[2].blocks[0].attn.pos_emb_funct.cpb_mlp[0].weight
    assert bias.grad.abs().sum() > 0


def test_half_precision_from_a_checkpoint(tmp_path, images):
    model = build().eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(images).summary
        half = RadioTimmModel.from_pretrained(tmp_path, dtype=torch.bfloat16)(images).summary
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_what_has_learned_opens_as_remote_code_without_this_package(tmp_path, images):
    model = build().train()
    output = model(images)
    (output.summary.square().sum() + output.features.square().sum()).backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if name.startswith("network."))
    torch.optim.SGD(model.network.parameters(), 0.01).step()
    model.eval().save_pretrained(tmp_path / "student")
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch; sys.modules['transformers_radio'] = None\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('student', trust_remote_code=True).eval()\n"
        "torch.save(model(torch.load('images.pt')).summary, 'out.pt')\n"
        "sys.modules['fastervit'] = None\n"
        "try:\n"
        "    AutoModel.from_pretrained('student', trust_remote_code=True)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "out.pt"), model(images).summary)
    assert "pip install 'fastervit>=1.0'" in done.stdout


def test_what_is_refused(monkeypatch, images):
    with pytest.raises(ValueError, match="built for 224 pixels; set image_size=224, or .*_any_res"):
        build(timm_model="faster_vit_0_224")
    with pytest.raises(ValueError, match="from_timm cannot load weights of faster_vit_0_any_res"):
        RadioTimmModel.from_timm("faster_vit_0_any_res")
    with pytest.raises(ValueError, match="no gradient checkpointing"):
        build().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="built for one size, 128x128"):
        build()(torch.rand(1, 3, 160, 160))
    monkeypatch.setitem(sys.modules, "fastervit", None)
    with pytest.raises(ImportError, match="pip install 'fastervit>=1.0'"):
        build()


def test_the_table_s_network_has_the_package_s_weights():
    own = timm.create_model("faster_vit_0_224", num_classes=0)
    with torch.device("meta"):
        model = RadioTimmModel(RadioTimmConfig(timm_model="faster_vit_0_224"))
    assert all(weight.is_meta for weight in model.parameters())
    assert model.config.image_size == 224 and model.feature_dim == model.summary_dim == 512
    twice = "levels.2.global_tokenizer.pos_embed."
    shapes = {name: weight.shape for name, weight in own.state_dict().items() if not name.startswith(twice)}
    assert {name: weight.shape for name, weight in model.network.state_dict().items()} == shapes
