"""Files that are damaged, cut, empty or of another model: a ValueError or OSError in one line that names them."""

import json

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from helpers.tiny_segment_anything import tiny_sam
from transformers_radio.teachers import build_teacher, load_sam, load_text_encoder

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3}
OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1},
}
CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONTAINS_ITSELF: dict = {}
CONTAINS_ITSELF["model"] = CONTAINS_ITSELF
BYTES = {"empty": b"", "no weights": b"<html>" * 50, "code": b"cos\nsystem\n(S'true'\ntR."}
OBJECTS = {
    "list": [1],
    "no tensors": {},
    "numbers as names": {1: torch.ones(1)},
    "itself": CONTAINS_ITSELF,
    "one tensor": torch.ones(3),
    "another model": {"a": torch.ones(2)},
}


@pytest.fixture(scope="module")
def states():
    return {
        "segment_anything": tiny_sam().state_dict(),
        "timm": timm.create_model("test_vit").state_dict(),
        "open_clip": open_clip.CLIP(**OPEN_CLIP).state_dict(),
    }


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPConfig(
        text_config={**CLIP, "vocab_size": 50}, vision_config={**CLIP, "image_size": 32, "patch_size": 16}
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor().save_pretrained(folder)
    return folder


def assert_named(call, name):
    with pytest.raises((ValueError, OSError)) as error:
        call()
    message = str(error.value)
    assert name in message and "\n" not in message and len(message) < 1500, message


def open_clip_folder(folder, config=None):
    config = {"model_cfg": OPEN_CLIP, "preprocess_cfg": PREPROCESSING} if config is None else config
    (folder / "open_clip_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder / "open_clip_pytorch_model.bin"


@pytest.mark.parametrize("damage", ["cut", *BYTES, *OBJECTS])
@pytest.mark.parametrize("kind", ["segment_anything", "timm", "open_clip"])
def test_torch_files(tmp_path, states, kind, damage):
    path = open_clip_folder(tmp_path) if kind == "open_clip" else tmp_path / "weights.pth"
    torch.save(OBJECTS.get(damage, states[kind]), path)
    if damage in BYTES:
        path.write_bytes(BYTES[damage])
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    checkpoint = {"segment_anything": str(path), "timm": f"test_vit:{path}", "open_clip": str(tmp_path)}[kind]
    assert_named(lambda: build_teacher(kind, checkpoint), str(tmp_path))
    if kind == "segment_anything":
        assert_named(lambda: load_sam(checkpoint), str(tmp_path))
    if kind == "open_clip":
        assert_named(lambda: load_text_encoder(kind, checkpoint), str(tmp_path))
        assert_named(lambda: build_teacher(kind, f"RN50:{path}"), str(path))


@pytest.mark.parametrize("damage", ["cut", *BYTES])
@pytest.mark.parametrize("kind", ["timm", "open_clip", "transformers"])
def test_safetensors_files(tmp_path, states, clip_folder, kind, damage):
    name = {"open_clip": "open_clip_model.safetensors"}.get(kind, "model.safetensors")
    if kind == "transformers":
        for file in clip_folder.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    else:
        open_clip_folder(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit"}))
        save_file(states[kind], tmp_path / name)
    path = tmp_path / name
    path.write_bytes(BYTES.get(damage, path.read_bytes()[:-500]))
    assert_named(lambda: build_teacher(kind, str(tmp_path)), str(tmp_path))
    if kind == "transformers":
        assert_named(lambda: load_text_encoder(kind, str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize("shape", [(), (5,), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "blocks.0.attn.rel_pos_h", "neck.0.weight"])
def test_a_sam_of_other_shapes(tmp_path, states, name, shape):
    path = tmp_path / "sam.pth"
    torch.save({**states["segment_anything"], f"image_encoder.{name}": torch.ones(shape)}, path)
    assert_named(lambda: build_teacher("segment_anything", str(path)), str(path))
    assert_named(lambda: load_sam(str(path)), str(path))


@pytest.mark.parametrize(
    "config",
    ["", "[]", "null", "{}", {"model_cfg": 3}, {"model_cfg": {**OPEN_CLIP, "vision_cfg": 3}}]
    + [{"model_cfg": {**OPEN_CLIP, "embed_dim": "x"}, "preprocess_cfg": PREPROCESSING}]
    + [{"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": "a", "std": [1, 1, 1]}}]
    + [{"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [float("nan")] * 3, "std": [1, 1, 1]}}]
    + [{"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0, 0, 0], "std": [0, 0, 0]}}],
)
def test_open_clip_s_configuration(tmp_path, states, config):
    torch.save(states["open_clip"], open_clip_folder(tmp_path, config))
    assert_named(lambda: build_teacher("open_clip", str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text"),
    [(file, text) for file in ("config.json", "preprocessor_config.json") for text in ("", "[]", "null")]
    + [("config.json", json.dumps({"model_type": kind})) for kind in (3, [1], "nothing")]
    + [("preprocessor_config.json", json.dumps({"image_mean": "x", "image_std": [1, 1, 1]}))]
    + [("preprocessor_config.json", json.dumps({"image_mean": [0, 0, 0], "image_std": [0, 0, 0]}))]
    + [("preprocessor_config.json", json.dumps({"do_normalize": "no", **PREPROCESSING}))],
)
def test_the_configurations_of_transformers(tmp_path, clip_folder, file, text):
    for one in clip_folder.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    (tmp_path / file).write_text(text)
    assert_named(lambda: build_teacher("transformers", str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": "x"}, {"hidden_size": 0}, {"num_attention_heads": 0}, {"hidden_act": "zz"}, {"patch_size": 0}]
    + [{"num_hidden_layers": 2}],
)
def test_fields_of_a_tower_of_transformers(tmp_path, clip_folder, fields):
    for one in clip_folder.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] |= fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_named(lambda: build_teacher("transformers", str(tmp_path)), str(tmp_path))
