"""`Teacher`'s own checks, `build_teacher`'s errors, and what importing the package costs."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, Dinov2Config, SiglipConfig, ViTConfig

import transformers_radio
from transformers_radio.teachers import Teacher, TeacherOutput, build_teacher, has_text
from transformers_radio.teachers.checkpoints import load_weights, portable_checkpoint, resolve_checkpoint


class Patches(Teacher):
    """A batch norm and a dropout, which betray a teacher that trains, before the patches' means."""

    def __init__(self, **kwargs):
        network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5), torch.nn.AvgPool2d(8))
        settings = {"image_size": 16, "patch_size": 8, "summary_dim": 3, "feature_dim": 3}
        super().__init__(network, **settings | {"normalization": ([0.1, 0.2, 0.3], [0.5, 0.25, 1.0])} | kwargs)

    def encode(self, pixel_values):
        maps = self.model(pixel_values)
        return TeacherOutput(maps.mean((2, 3)), maps.flatten(2).mT, (2, 2))


def test_normalization_and_order(images, assert_contract):
    """Closed form: each feature is its patch's mean color, normalized, row by row."""
    output = assert_contract(Patches())
    batch = images(16)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        patch = batch[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].mean((2, 3))
        expected = (patch - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.25, 1.0])
        torch.testing.assert_close(output.features[:, i], expected / (1 + 1e-5) ** 0.5)  # batch norm's epsilon


def test_statistics_do_not_move(images):
    teacher = Patches()
    teacher.train()
    before = teacher.model[0].running_mean.clone()
    first, second = teacher(images(16)), teacher(images(16))
    torch.testing.assert_close(teacher.model[0].running_mean, before, rtol=0, atol=0)
    torch.testing.assert_close(first.features, second.features, rtol=0, atol=0)


def test_targets_can_enter_a_loss(images):
    """The outputs take part in a student's autograd graph (an inference-mode tensor could not)."""
    output = Patches()(images(16))
    student = torch.nn.Linear(3, 3)
    (student(output.features) * output.features).sum().backward()
    assert student.weight.grad is not None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.rand(2, 3, 24, 16), "images are 24x16, but this teacher's image_size is 16: resize them to 16x16"),
        (torch.rand(2, 1, 16, 16), r"shape \(2, 1, 16, 16\)"),
        (torch.rand(3, 16, 16), r"shape \(3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "torch.uint8.*divide uint8 by 255"),
        (torch.full((2, 3, 16, 16), 255.0), r"span \[255, 255\]"),
        (torch.full((2, 3, 16, 16), -0.5), r"span \[-0.5, -0.5\]"),
        (torch.full((2, 3, 16, 16), float("nan")), r"span \[nan, nan\]"),
    ],
)
def test_wrong_images(batch, message):
    with pytest.raises(ValueError, match=message):
        Patches()(batch)


@pytest.mark.parametrize("wrong", [{"summary_dim": 4}, {"summary_dim": None}, {"feature_dim": 5}])
def test_a_teacher_that_breaks_its_promise(images, wrong):
    with pytest.raises(RuntimeError, match="Patches.encode returned .* but promised"):
        Patches(**wrong)(images(16))


def test_unknown_dtype():
    with pytest.raises(ValueError, match="dtype='float8' is unknown: use one of float32, bfloat16, float16"):
        Patches().cast("float8")


def test_unknown_type():
    message = "type 'clip' is unknown: use one of open_clip, transformers, segment_anything, timm, python"
    with pytest.raises(ValueError, match=message):
        build_teacher("clip", "anything")


def test_whether_a_teacher_has_a_text_tower_is_known_without_weights(tmp_path):
    for number, (config, expected) in enumerate(
        [(CLIPConfig(), True), (SiglipConfig(), True), (Dinov2Config(), False), (ViTConfig(), False)]
    ):
        config.save_pretrained(tmp_path / str(number))
        assert has_text(f"transformers:{tmp_path / str(number)}") is expected
    assert has_text("open_clip:ViT-H-14:dfn5b") is True
    for name in ("segment_anything:sam.pth", "timm:vit_base", "python:my:Teacher", "", "open_clip", "a student"):
        assert has_text(name) is False
    assert has_text("transformers:local:clip") is None and has_text(f"transformers:{tmp_path}/nowhere") is None


W = {"a": torch.arange(3.0), "module_b": torch.ones(2)}


@pytest.mark.parametrize(
    "saved",
    [
        W,
        {"state_dict": W, "epoch": 3, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1)},
        {"model": {f"module.{name}": tensor for name, tensor in W.items()}},
        {f"module._orig_mod.{name}": tensor for name, tensor in W.items()},
        {"student": {"a": torch.zeros(1)}, "teacher": {f"module.{name}": tensor for name, tensor in W.items()}},
        {"state_dict": {"model": W}},
        {"model": {"a": torch.zeros(1)}, "model_ema": W},
        {"module": W, "global_steps": 7},
    ],
    ids=["plain", "state_dict", "DDP", "compiled DDP", "DINO", "twice", "average", "DeepSpeed"],
)
def test_a_state_dict_is_found_in_what_training_scripts_save(saved, tmp_path, caplog):
    torch.save(saved, tmp_path / "a.pth")
    found = load_weights(tmp_path / "a.pth")
    assert found.keys() == W.keys()
    torch.testing.assert_close(found, W)
    assert ("not those under" in caplog.text) == (len({"student", "model_ema"} & saved.keys()) > 0)


def test_load_weights(tmp_path):
    save_file(W, tmp_path / "a.safetensors")
    torch.save(W, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "old.pth"):
        torch.testing.assert_close(load_weights(tmp_path / name), W)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no plain state dict"):
        load_weights(tmp_path / "list.pth")
    (tmp_path / "noise.pth").write_bytes(b"\x80\x04not weights")
    with pytest.raises(ValueError, match="noise.pth is no file of plain tensors"):
        load_weights(tmp_path / "noise.pth")


def test_where_a_checkpoint_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models" / "clip").mkdir(parents=True)
    (tmp_path / "sam.pth").touch()
    package = Path(transformers_radio.__file__).parent
    clip = f"{package}/quickstart/teachers/clip"
    resolved = {
        "~/models/clip": f"{tmp_path}/models/clip",
        "ViT-B-32:~/sam.pth": f"ViT-B-32:{tmp_path}/sam.pth",
        "local-dir:~/models/clip": f"local-dir:{tmp_path}/models/clip",
        "package:quickstart/teachers/clip": clip,
        "facebook/dinov2-base": "facebook/dinov2-base",
        "hf-hub:owner/name": "hf-hub:owner/name",
        "ViT-H-14:dfn5b": "ViT-H-14:dfn5b",
    }
    assert {given: resolve_checkpoint(given) for given in resolved} == resolved
    portable = {
        f"{tmp_path}/models/clip": "local:clip",
        f"local-dir:{tmp_path}/models/clip/": "local:clip",
        "~/models/clip": "local:clip",
        "ViT-B-32:~/sam.pth": "ViT-B-32:local:sam.pth",
        clip: "package:quickstart/teachers/clip",
        f"local-dir:{clip}": "package:quickstart/teachers/clip",
        "package:quickstart/teachers/clip": "package:quickstart/teachers/clip",
        "facebook/dinov2-base": "facebook/dinov2-base",
        "hf-hub:owner/name": "hf-hub:owner/name",
        "ViT-H-14:dfn5b": "ViT-H-14:dfn5b",
        "module:Class": "module:Class",
    }
    assert {given: portable_checkpoint(given) for given in portable} == portable
    for one in ("local:clip", "ViT-B-32:local:sam.pth"):
        assert portable_checkpoint(one) == one
        with pytest.raises(ValueError, match=f"{one} was on the machine that trained with it; give its path"):
            resolve_checkpoint(one)


def test_importing_the_package_imports_no_teacher_library():
    code = (
        "import sys, transformers_radio.teachers; "
        "heavy = {'open_clip', 'timm', 'segment_anything', 'torchvision', 'transformers'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize(
    ("library", "type", "checkpoint"),
    [
        ("open_clip", "open_clip", "ViT-B-32:openai"),
        ("segment_anything", "segment_anything", "sam_vit_b_01ec64.pth"),
        ("timm", "timm", "resnet18"),
    ],
)
def test_a_missing_library_names_the_extra(monkeypatch, library, type, checkpoint):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    with pytest.raises(
        ImportError, match=rf'{library}, which is not installed: pip install "transformers_radio\[teach'
    ):
        build_teacher(type, checkpoint)
