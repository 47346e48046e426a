"""Loading never lies: what is missing, left over, contradicted or damaged is an error that names it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers.tiny_radio import ADAPTORS, TINY
from helpers.tiny_radio import build_with_adaptors as build
from transformers_radio import (
    RadioBackbone,
    RadioConfig,
    RadioForImageClassification,
    RadioForSemanticSegmentation,
    RadioModel,
    RadioVisionTower,
    load_student,
)
from transformers_radio.cli import app

FAMILY = [RadioModel, RadioForImageClassification, RadioForSemanticSegmentation, RadioBackbone, RadioVisionTower]


@pytest.mark.parametrize("model_class", [RadioModel, RadioForSemanticSegmentation, RadioVisionTower])
def test_another_width_is_an_error_even_where_mismatches_are_ignored(tmp_path, model_class):
    build().save_pretrained(tmp_path)
    config = RadioConfig.from_pretrained(tmp_path)
    config.hidden_size = 64
    with pytest.raises(ValueError, match="other shapes.*would be random") as error:
        model_class.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert "32" in str(error.value) and "64" in str(error.value)


def test_heads_of_another_width_may_start_afresh_by_name(tmp_path):
    RadioForImageClassification(RadioConfig(**TINY, num_labels=3)).save_pretrained(tmp_path / "three")
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = RadioForImageClassification.from_pretrained(tmp_path / "three", num_labels=5, **options)
    assert {key for key, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert torch.equal(
        model.summary_norm.weight, load_file(tmp_path / "three/model.safetensors")["summary_norm.weight"]
    )
    build().save_pretrained(tmp_path / "student")
    adaptors = {name: {**adaptor, "feature_dim": 14} for name, adaptor in ADAPTORS.items()}
    with pytest.raises(ValueError, match="adaptors.clip.feature_head"):
        RadioModel.from_pretrained(tmp_path / "student", adaptors=adaptors, **options)
    model, info = RadioModel.from_pretrained(
        tmp_path / "student", adaptors=adaptors, allow_missing=["adaptors."], **options
    )
    assert {key.split(".")[2] for key, *_ in info["mismatched_keys"]} == {"feature_head"}


@pytest.mark.parametrize("model_class", FAMILY[1:])
def test_adaptors_that_are_meant_to_be_left_out_are_not_reported(tmp_path, model_class):
    build().save_pretrained(tmp_path / "student")
    RadioForImageClassification.from_pretrained(tmp_path / "student").save_pretrained(tmp_path / "head")
    _, info = model_class.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["unexpected_keys"]
    _, info = RadioModel.from_pretrained(tmp_path / "student", adaptors={}, output_loading_info=True)
    assert info["unexpected_keys"]  # a student without its adaptors, as asked for, is reported
    _, info = RadioVisionTower.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"classifier", "summary_norm"}


def remove_weights(folder: Path, prefix: str):
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("prefix", ["adaptors.clip.summary_head.", "encoder.layer.1.mlp.", "input_conditioner."])
def test_a_weight_that_is_not_in_the_file_is_an_error(tmp_path, prefix):
    model = build()
    model.save_pretrained(tmp_path)
    remove_weights(tmp_path, prefix)
    with pytest.raises(ValueError) as error:
        RadioModel.from_pretrained(tmp_path)
    assert prefix in str(error.value) and "allow_missing" in str(error.value)


def test_new_weights_are_allowed_by_name_only(tmp_path):
    model = build(adaptors={})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adaptors.clip"):
        RadioModel.from_pretrained(tmp_path, adaptors=build().config.adaptors)
    loaded, info = RadioModel.from_pretrained(
        tmp_path, adaptors=build().config.adaptors, allow_missing=["adaptors."], output_loading_info=True
    )
    assert info["missing_keys"] and all(key.startswith("adaptors.") for key in info["missing_keys"])
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(images).features, model(images).features)
    remove_weights(tmp_path, "embeddings.position_embedding")
    with pytest.raises(ValueError, match="embeddings.position_embedding"):
        RadioModel.from_pretrained(tmp_path, adaptors=build().config.adaptors, allow_missing=["adaptors."])


def test_nvidia_layout_is_refused_and_the_advice_works(tmp_path):
    native = transformers.RadioModel(transformers.RadioConfig(**TINY)).eval()
    native.save_pretrained(tmp_path / "released")  # transformers writes the released names by default
    assert any(key.startswith("radio_model.") for key in load_file(tmp_path / "released/model.safetensors"))
    with pytest.raises(ValueError, match="transformers-radio convert .*released FOLDER") as error:
        RadioModel.from_pretrained(tmp_path / "released")
    command = str(error.value).partition("`")[2].partition("`")[0].split()
    assert CliRunner().invoke(app, [*command[1:-1], str(tmp_path / "converted")]).exit_code == 0
    ours = RadioModel.from_pretrained(tmp_path / "converted")
    images = torch.rand(1, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(ours(images).summary, native(images).summary)
        assert torch.equal(ours(images).features, native(images).features)


def test_a_summary_selection_that_the_file_contradicts_is_an_error(tmp_path):
    build(adaptors={}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\[1, 0\].*\[0, 1\]"):
        RadioModel.from_pretrained(tmp_path, summary_idxs=[1, 0])


def edit_config(folder: Path, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


CONTRADICTIONS = [
    ({"num_hidden_layers": 1}, FAMILY, "encoder.layer.1.*num_hidden_layers"),
    (
        {"num_hidden_layers": 3},
        [RadioModel, RadioBackbone, RadioVisionTower],
        "encoder.layer.2.*not in|not in.*layer.2",
    ),
    ({"num_hidden_layers": -1}, FAMILY, "num_hidden_layers is -1"),
    ({"adaptors": {}}, [RadioModel], "adaptors.clip.*allow_unexpected"),
    ({"adaptors": {"clip": ADAPTORS["clip"]}}, [RadioModel], "adaptors.sam.*allow_unexpected"),
    ({"layer_norm_eps": float("nan")}, FAMILY, "layer_norm_eps is nan"),
    ({"layer_norm_eps": -1}, FAMILY, "layer_norm_eps is -1"),
    ({"layer_norm_eps": float("inf")}, FAMILY, "layer_norm_eps is inf"),
    ({"qkv_bias": False}, FAMILY, "q_proj.bias.*no place|no place.*k_proj.bias"),
    ({"hidden_act": "x"}, FAMILY, "hidden_act is 'x'"),
    ({"hidden_size": 0}, FAMILY, "hidden_size is 0"),
    ({"hidden_size": 65536}, FAMILY, r"other shapes.*32.*65536"),  # would not fit into memory
    ({"num_registers": 2}, FAMILY, r"cls_register_token is \(3, 32\) there and \(4, 32\) here"),
    ({"adaptors": {**ADAPTORS, "clip": {**ADAPTORS["clip"], "summary_token": True}}}, FAMILY, "summary_token is True"),
    (
        {"adaptors": {**ADAPTORS, "clip": {**ADAPTORS["clip"], "mlp_num_inner": 10**9}}},
        FAMILY,
        "mlp_num_inner is 1000",
    ),
]


@pytest.mark.parametrize(("fields", "classes", "words"), CONTRADICTIONS)
def test_a_configuration_that_contradicts_the_weights(tmp_path, fields, classes, words):
    build().save_pretrained(tmp_path)
    edit_config(tmp_path, **fields)
    for model_class in classes:
        with pytest.raises(ValueError, match=words) as error:
            model_class.from_pretrained(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_weights_may_be_left_out_by_name_only(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, adaptors={})
    with pytest.raises(ValueError, match="adaptors.clip"):
        RadioModel.from_pretrained(tmp_path, allow_unexpected=["encoder."])
    loaded = RadioModel.from_pretrained(tmp_path, allow_unexpected=["adaptors."])
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(images).features, model(images).features) and not loaded.adaptors


@pytest.mark.parametrize("out_indices", [[0], [1], [2]])
def test_a_backbone_leaves_out_only_the_blocks_after_its_last_map(tmp_path, out_indices):
    model = build()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 32, 32)
    found = RadioBackbone.from_pretrained(tmp_path, out_indices=out_indices)(images).feature_maps[0]
    expected = model(images, output_hidden_states=True).hidden_states[out_indices[0]][:, 3:]
    assert torch.equal(found.flatten(2).transpose(1, 2), expected)
    edit_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match="no place.*encoder.layer.1"):
        RadioBackbone.from_pretrained(tmp_path, out_indices=[0])


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-100])


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[-1]


DAMAGE = {
    "cut": (lambda folder: cut(last_shard(folder)), "model-0000.-of-0000..safetensors cannot be read"),
    "empty": (lambda folder: last_shard(folder).write_bytes(b""), "model-0000.-of-0000..safetensors cannot be read"),
    "html": (lambda folder: last_shard(folder).write_text("<html>" * 9), "model-0000.-of-0000..safetensors cannot be"),
    "no shard": (lambda folder: last_shard(folder).unlink(), "No such file.*model-0000.-of-0000..safetensors"),
    "no json": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        r"\.json file in it is damaged",
    ),
    "no map": (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "cannot be read"),
    "list": (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "cannot be read"),
    "nothing": (lambda folder: [path.unlink() for path in folder.glob("model*")], "no file named model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(tmp_path, damage):
    build().save_pretrained(tmp_path, max_shard_size="100KB")
    change, words = DAMAGE[damage]
    change(tmp_path)
    for load in (RadioModel.from_pretrained, RadioBackbone.from_pretrained, lambda path: load_student(build(), path)):
        with pytest.raises((ValueError, OSError), match=words) as error:
            load(tmp_path)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "the checkpoint is None"),
        ("", "the checkpoint is ''"),
        (3, "the checkpoint is 3"),
        ([], r"the checkpoint is \[\]"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("no/such/folder", "there is no folder no/such/folder"),
    ],
)
@pytest.mark.parametrize(
    "load",
    [RadioConfig.from_pretrained, RadioModel.from_pretrained, lambda source: load_student(build(), source)],
    ids=["config", "model", "student"],
)
def test_what_is_not_a_checkpoint(load, source, words):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^[^\n]*{words}[^\n]*$"):
        load(source)


def test_a_model_without_values_loads(tmp_path):
    build().save_pretrained(tmp_path)
    assert RadioModel.from_pretrained(tmp_path, device_map="meta").device.type == "meta"
