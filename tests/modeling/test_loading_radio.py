"""One checkpoint, three loaders; and what must not load."""

import inspect
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from transformers_radio import (
    RadioBackbone,
    RadioConfig,
    RadioForImageClassification,
    RadioForSemanticSegmentation,
    RadioModel,
    RadioVisionTower,
    load_student,
)

TINY = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_img_size=256, num_cls_tokens=2, num_registers=1
)
ADAPTORS = {
    "clip": {"summary_dim": 12, "feature_dim": 10, "hidden_dim": 16, "summary_token": 0, "teacher": "clip"},
    "sam": {
        "summary_dim": None,
        "feature_dim": 6,
        "hidden_dim": 16,
        "mlp_num_inner": 1,
        "spatial_mlp_version": "attn",
        "upsample_factor": 2,
    },
}


def build(**fields):
    torch.manual_seed(0)
    model = RadioModel(RadioConfig(**{**TINY, "summary_idxs": [0, 1], "adaptors": ADAPTORS, **fields})).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


VARIANTS = {
    "final_norm": {"final_norm": True},
    "mlp_norm": {"mlp_norm": True},
    "mean": {"summary_type": "mean"},
    "window": {"window_size": 2},
}
DTYPES = ("float32", "bfloat16")


@torch.no_grad()
def outputs(model, images):
    for parameter in model.parameters():
        # weights mapped from a file may start at odd addresses, which changes the last bit of a matrix product
        parameter.data = parameter.data.clone()
    out = model(images.to(model.dtype))
    tensors = {"summary": out.summary, "features": out.features}
    for name, adaptor in (getattr(out, "adaptors", None) or {}).items():
        tensors.update({f"{name}.{kind}": value for kind, value in adaptor.items() if kind != "grid"})
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


COMMON = f"""
import torch
from safetensors.torch import load_file, save_file

{inspect.getsource(outputs)}
"""

PROCESS = """
import importlib.util, json, sys
assert (importlib.util.find_spec("transformers_radio") is None) == (sys.argv[1] == "blocked")
import transformers
from transformers import AutoConfig, AutoModel
images = load_file("images.safetensors")["images"]
report = {}
"""

BLOCKED = """
def error(call):
    try:
        call()
    except Exception as error:
        return str(error)

for name in ("float32", "bfloat16"):
    options = {"dtype": getattr(torch, name)}
    model = AutoModel.from_pretrained(name, trust_remote_code=True, **options)
    report[name] = [type(model).__module__, str(model.dtype)]
    save_file(outputs(model, images), name + ".remote")
    native, info = AutoModel.from_pretrained(name, output_loading_info=True, **options)
    assert type(native) is transformers.RadioModel and native.dtype == options["dtype"]
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert info["unexpected_keys"] and all(key.startswith("adaptors.") for key in info["unexpected_keys"])
    # its half precision rounds mean and std, which ours keep
    native.input_conditioner.float().load_state_dict(model.input_conditioner.state_dict())
    save_file(outputs(native, images), name + ".native")
model.save_pretrained("again")

config = AutoConfig.from_pretrained("float32")  # transformers' own class
assert type(config) is transformers.RadioConfig
model = AutoModel.from_pretrained("float32", config=config, trust_remote_code=True)
save_file(outputs(model, images), "float32.config")
model = AutoModel.from_config(config, trust_remote_code=True)
report["from_config"] = [type(model).__module__, list(model.adaptors)]

for name in ("final_norm", "mlp_norm", "mean", "window", "head"):
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    report[name] = [type(model).__module__, str(model.dtype)]
    save_file(outputs(model, images), name + ".remote")
    report[name + " errors"] = [
        error(lambda: AutoModel.from_pretrained(name)),
        error(lambda: transformers.RadioModel.from_pretrained(name)),
        error(lambda: AutoConfig.from_pretrained(name)),
    ]
json.dump(report, open("report.json", "w"))
"""

INSTALLED = """
from transformers_radio import RadioModel, register
for name in ("float32", "bfloat16"):
    save_file(outputs(RadioModel.from_pretrained(name, dtype=getattr(torch, name)), images), name + ".ours")
    assert type(AutoModel.from_pretrained(name)) is transformers.RadioModel  # importing took nobody's place
register()
model = AutoModel.from_pretrained("float32")
assert type(model) is RadioModel and list(model.adaptors) == ["clip", "sam"], type(model)
"""


def run(code, folder, blocked):
    """`code` in a new process; `blocked`: where this package cannot be imported (no .pth files are read)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    env |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMON + PROCESS + code, "blocked" if blocked else "installed"]
    if blocked:
        env["PYTHONPATH"] = sysconfig.get_paths()["purelib"]
        command.insert(1, "-S")
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Checkpoints in shards, what their models say, and what two other processes read out of them."""
    root = tmp_path_factory.mktemp("checkpoints")
    images = torch.rand(2, 3, 64, 96)
    save_file({"images": images}, root / "images.safetensors")
    for name in DTYPES:
        model = build().to(getattr(torch, name))
        model.save_pretrained(root / name, max_shard_size="100KB")
        assert len(list((root / name).glob("*.safetensors"))) > 1
        save_file(outputs(model, images), root / f"{name}.expected")
    for name, fields in VARIANTS.items():
        model = build(**fields)
        model.save_pretrained(root / name)
        save_file(outputs(model, images), root / f"{name}.expected")
    head = RadioForImageClassification(build(summary_type="mean").config).eval()
    head.save_pretrained(root / "head")
    save_file(outputs(head.model, images), root / "head.expected")
    run(BLOCKED, root, blocked=True)
    run(INSTALLED, root, blocked=False)
    return root


def assert_same(root, name, tag, adaptors=True):
    expected, found = load_file(root / f"{name}.expected"), load_file(root / f"{name}.{tag}")
    if not adaptors:
        expected = {key: expected[key] for key in ("summary", "features")}
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == found[key].dtype and torch.equal(tensor, found[key]), (name, key)


@pytest.mark.parametrize("name", DTYPES)
def test_our_package_loads_a_checkpoint(root, name):
    assert_same(root, name, "ours")
    assert load_file(root / f"{name}.expected").keys() == {
        "summary",
        "features",
        "clip.summary",
        "clip.features",
        "sam.features",
    }


@pytest.mark.parametrize("name", DTYPES)
def test_auto_model_with_remote_code_loads_it_without_our_package(root, name):
    assert_same(root, name, "remote")
    module, dtype = json.loads((root / "report.json").read_text())[name]
    assert module.startswith("transformers_modules.") and dtype == f"torch.{name}"


@pytest.mark.parametrize("name", DTYPES)
def test_plain_auto_model_loads_the_backbone(root, name):
    assert_same(root, name, "native", adaptors=False)


def test_a_config_read_without_trust_serves_the_remote_code(root):
    assert_same(root, "float32", "config")
    module, adaptors = json.loads((root / "report.json").read_text())["from_config"]
    assert module.startswith("transformers_modules.") and adaptors == ["clip", "sam"]


def test_a_checkpoint_saved_by_the_remote_code_is_whole(root):
    assert {p.name for p in (root / "again").glob("*.py")} == {p.name for p in (root / "bfloat16").glob("*.py")}
    again = outputs(
        RadioModel.from_pretrained(root / "again", dtype=torch.bfloat16),
        load_file(root / "images.safetensors")["images"],
    )
    for key, tensor in load_file(root / "bfloat16.expected").items():
        assert torch.equal(tensor, again[key])


@pytest.mark.parametrize("name", [*VARIANTS, "head"])
def test_what_native_would_misread_loads_with_our_code_only(root, name):
    assert_same(root, name, "remote")
    report = json.loads((root / "report.json").read_text())
    assert report[name][0].startswith("transformers_modules.")
    for message in report[f"{name} errors"]:
        assert "trust_remote_code=True" in message and "pip install transformers_radio" in message


def test_importing_the_package_is_light():
    code = "import sys, transformers_radio; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_save_load_save_is_stable(variant, tmp_path):
    images = torch.rand(1, 3, 64, 64)
    model = build(**VARIANTS[variant])
    model.save_pretrained(tmp_path / "a")
    again = RadioModel.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    expected, found = outputs(model, images), outputs(again, images)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


# ---------------------------------------------------------------- configurations of transformers' own class

FAMILY = [RadioModel, RadioForImageClassification, RadioForSemanticSegmentation, RadioBackbone, RadioVisionTower]


@pytest.mark.parametrize("model_class", FAMILY)
def test_a_native_config_gives_the_same_model(tmp_path, model_class):
    build().save_pretrained(tmp_path)
    native = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(native) is transformers.RadioConfig
    native.window_size = 2  # set after loading, as on any config
    images = torch.rand(1, 3, 64, 64)
    torch.manual_seed(0)
    found = model_class.from_pretrained(tmp_path, config=native, attn_implementation="eager").eval()
    torch.manual_seed(0)
    expected = model_class.from_pretrained(tmp_path, attn_implementation="eager").eval()
    backbones = [model if model_class is RadioModel else model.model for model in (found, expected)]
    assert list(backbones[0].adaptors) == list(backbones[1].adaptors)
    assert backbones[0].config.window_size == 2 and backbones[0].config._attn_implementation == "eager"
    with torch.no_grad():
        a, b = (backbone(images, window_size=2) for backbone in backbones)
    assert torch.equal(a.features, b.features)
    assert isinstance(found.config, model_class.config_class)
    for build_empty in (model_class, model_class._from_config):
        assert isinstance(build_empty(native).config, model_class.config_class)


def test_a_student_loaded_with_a_native_config_saves_the_same_config(tmp_path):
    build().save_pretrained(tmp_path / "a")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    RadioModel.from_pretrained(tmp_path / "a", config=config).save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


@pytest.mark.parametrize("model_class", FAMILY)
def test_configs_of_other_models_are_named(model_class):
    with pytest.raises(ValueError, match="expected a Radio.*Config, got a Dinov2Config.*trust_remote_code=True"):
        model_class(transformers.Dinov2Config())
    with pytest.raises(ValueError, match="use_swiglu_ffn is True"):
        model_class(transformers.RadioConfig(**TINY, use_swiglu_ffn=True))


# ---------------------------------------------------------------- loading never lies


@pytest.mark.parametrize("model_class", [RadioModel, RadioForSemanticSegmentation, RadioVisionTower])
def test_another_width_is_an_error_even_where_mismatches_are_ignored(tmp_path, model_class):
    build().save_pretrained(tmp_path)
    config = RadioConfig.from_pretrained(tmp_path)
    config.hidden_size = 64
    with pytest.raises(ValueError, match="other shapes.*would be random") as error:
        model_class.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert "32" in str(error.value) and "64" in str(error.value)


def test_heads_of_another_width_may_start_anew_by_name(tmp_path):
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
    assert info["unexpected_keys"]  # a student without its adaptors, as asked for, is told
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
    native = transformers.RadioModel(transformers.RadioConfig(**TINY, summary_idxs=[0, 1])).eval()
    native.save_pretrained(tmp_path / "released")  # transformers writes the released names by default
    assert any(key.startswith("radio_model.") for key in load_file(tmp_path / "released/model.safetensors"))
    with pytest.raises(ValueError, match="save_original_format=False"):
        RadioModel.from_pretrained(tmp_path / "released")
    opened = transformers.RadioModel.from_pretrained(tmp_path / "released")
    opened.save_pretrained(tmp_path / "converted", save_original_format=False)
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
def test_a_backbone_leaves_out_the_blocks_after_its_last_map_alone(tmp_path, out_indices):
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
def test_what_is_no_checkpoint(load, source, words):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^[^\n]*{words}[^\n]*$"):
        load(source)


def test_a_model_without_values_loads(tmp_path):
    build().save_pretrained(tmp_path)
    assert RadioModel.from_pretrained(tmp_path, device_map="meta").device.type == "meta"
