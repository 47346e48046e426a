"""InternViT from all its kinds of files, and models that bring their code along, against a model written here."""

import builtins
import importlib.util
import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from transformers_radio.teachers import build_teacher, load_text_encoder

# InternViT-6B in miniature, under its own names: RMSNorm, one matrix for queries, keys and values, their norms over
# all heads, layer scale; no norm at the end. Proof of having run: the file RAN beside it.
CODE = """
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

Path("{ran}").write_text("the code ran")


class TinyConfig(PretrainedConfig):
    model_type = "tiny_intern"

    def __init__(self, hidden_size=32, num_attention_heads=4, image_size=48, patch_size=8, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.image_size, self.patch_size = image_size, patch_size


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (len(self.weight),), self.weight, eps=1e-6)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width), RMSNorm(width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict({{"fc1": nn.Linear(width, 48), "fc2": nn.Linear(48, width)}})
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))) * self.ls2


class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        width, tokens = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.encoder = nn.Module()
        layers = [Layer(width, config.num_attention_heads) for _ in range(2)]
        self.encoder.layers = nn.ModuleList(layers)
        self.post_init()

    def forward(self, pixel_values):
        patches = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.embeddings.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        x = x + self.embeddings.position_embedding
        for layer in self.encoder.layers:
            x = layer(x)
        return BaseModelOutput(last_hidden_state=x)
"""
# The fields of an original configuration; the code beside the weights is of another version of transformers.
ORIGINAL = {
    "model_type": "intern_vit_6b",
    "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig"},
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 48,
    "patch_size": 8,
    "norm_type": "rms_norm",
    "qkv_bias": False,
    "qk_normalization": True,
    "drop_path_rate": 0.1,
    "use_flash_attn": True,
}


@pytest.fixture
def reference(tmp_path, randomize):
    """The model above with random weights, imported as any module."""
    path = tmp_path / "reference.py"
    path.write_text(CODE.format(ran=tmp_path / "imported"))
    spec = importlib.util.spec_from_file_location("tiny_intern_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return randomize(module.TinyModel(module.TinyConfig()))


def write(folder, config, weights):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.CLIPImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3).save_pretrained(folder)
    return str(folder)


def prefixed(weights, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def assert_same_targets(teacher, reference, images):
    output = teacher(images(48))
    with torch.no_grad():
        tokens = reference(images(48)).last_hidden_state
    assert output.grid == (6, 6) and (teacher.summary_dim, teacher.feature_dim) == (32, 32)
    torch.testing.assert_close(output.summary, tokens[:, 0])
    torch.testing.assert_close(output.features, tokens[:, 1:])


@pytest.mark.parametrize("outer", [False, True], ids=["InternViT", "InternVL"])
def test_the_original_files_are_read_without_their_code(outer, reference, images, tmp_path, assert_contract):
    config, weights = ORIGINAL, reference.state_dict()
    if outer:
        config = {"model_type": "internvl_chat", "vision_config": ORIGINAL, "llm_config": {}}
        weights = {
            **prefixed(weights, "vision_model."),
            "language_model.x": torch.ones(1),
            "mlp1.0.weight": torch.ones(1),
        }
    teacher = build_teacher("transformers", write(tmp_path / "original", config, weights))
    assert_contract(teacher)
    assert_same_targets(teacher, reference, images)


def test_an_original_file_has_to_fit(reference, tmp_path):
    weights = reference.state_dict()
    del weights["encoder.layers.1.ls2"]
    with pytest.raises(ValueError, match=r"missing keys \['encoder.layer.1.lambda_2'\]"):
        build_teacher("transformers", write(tmp_path / "less", ORIGINAL, weights))
    with pytest.raises(ValueError, match=r"unexpected keys \['strange"):
        build_teacher(
            "transformers", write(tmp_path / "more", ORIGINAL, reference.state_dict() | {"strange": torch.ones(1)})
        )


def test_transformers_own_internvl_gives_its_vision_tower(images, tmp_path, randomize):
    text = {"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision |= {"image_size": [48, 48], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(vision_config=vision, text_config=text)
    model = randomize(transformers.InternVLForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3).save_pretrained(tmp_path)
    assert_same_targets(build_teacher("transformers", str(tmp_path)), model.model.vision_tower, images)


@pytest.fixture
def remote(reference, tmp_path, monkeypatch):
    """A folder whose model is code beside its weights, and the file that this code writes when it runs."""
    ran = tmp_path / "ran"
    config = {"model_type": "tiny_intern", "hidden_size": 32, "image_size": 48, "patch_size": 8}
    config["auto_map"] = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    folder = write(tmp_path / "remote", config, reference.state_dict())
    (tmp_path / "remote" / "modeling_tiny.py").write_text(CODE.format(ran=ran))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return folder, ran


def test_code_of_a_checkpoint_runs_only_when_told(remote, reference, images, monkeypatch):
    folder, ran = remote

    def asked(*_):
        raise AssertionError("a teacher must not ask")

    monkeypatch.setattr(builtins, "input", asked)
    with pytest.raises(ValueError, match="tiny_intern"):
        build_teacher("transformers", folder)
    with pytest.raises(ValueError, match="remote is a VisionModelTeacher, which has no text tower"):
        load_text_encoder("transformers", folder)
    with pytest.raises(
        ValueError, match=r"only code of its own can open.*options: \{trust_remote_code: true, revision"
    ):
        build_teacher("transformers", folder)
    with pytest.raises(ValueError, match="trust_remote_code='false' is neither true nor false"):
        build_teacher("transformers", folder, trust_remote_code="false")
    assert not ran.exists()
    teacher = build_teacher("transformers", folder, trust_remote_code=True, revision="main")
    assert ran.exists()
    assert_same_targets(teacher, reference, images)


def test_a_type_with_a_teacher_of_its_own_needs_no_code(reference, tmp_path):
    with pytest.raises(ValueError, match=r"intern_vit_6b teacher does not know 'trust_remote_code'"):
        build_teacher("transformers", write(tmp_path / "x", ORIGINAL, reference.state_dict()), trust_remote_code=True)


def test_a_type_that_nobody_knows_is_one_line(tmp_path):
    folder = write(tmp_path / "x", {"model_type": "nobody"}, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="model_type 'nobody', which transformers cannot open") as raised:
        build_teacher("transformers", folder)
    assert "\n" not in str(raised.value)
