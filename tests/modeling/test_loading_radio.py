"""One checkpoint, three loaders; and configurations of transformers' own class."""

import inspect
import json
import os
import subprocess
import sys
import sysconfig

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers.tiny_radio import build_with_adaptors as build
from transformers_radio import (
    RadioBackbone,
    RadioForImageClassification,
    RadioForSemanticSegmentation,
    RadioModel,
    RadioVisionTower,
)

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
    # in half precision it rounds mean and std, which ours keeps exact
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
    assert type(AutoModel.from_pretrained(name)) is transformers.RadioModel  # importing replaced no class
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
    """Checkpoints in shards, the outputs of their models, and what two other processes compute from them."""
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
    with pytest.raises(ValueError, match="video_temporal_patch_size is 2"):
        model_class(transformers.RadioConfig(video_temporal_patch_size=2))
