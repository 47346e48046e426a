"""`Teacher`'s own checks, `build_teacher`'s errors, and what importing the package costs."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from transformers_radio.teachers import Teacher, TeacherOutput, build_teacher
from transformers_radio.teachers.base import load_weights


class Patches(Teacher):
    """A batch norm and a dropout, which betray a teacher that trains, before the patches' means."""

    def __init__(self, **kwargs):
        network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5), torch.nn.AvgPool2d(8))
        settings = {"image_size": 16, "patch_size": 8, "summary_dim": 3, "feature_dim": 3}
        super().__init__(network, **settings | {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 1.0]} | kwargs)

    def encode(self, pixel_values):
        maps = self.model(pixel_values)
        return TeacherOutput(maps.mean((2, 3)), maps.flatten(2).mT, (2, 2))


def test_normalisation_and_order(images, assert_contract):
    """Closed form: each feature is its patch's mean colour, normalised, row by row."""
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
        Patches(dtype="float8")


def test_unknown_type():
    message = "type 'clip' is unknown: use one of open_clip, transformers, segment_anything, timm, python"
    with pytest.raises(ValueError, match=message):
        build_teacher("clip", "anything")


def test_load_weights(tmp_path):
    weights = {"a": torch.arange(3.0)}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "a.pt")
    torch.save({"model": weights}, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pt", "a.pth", "old.pth"):
        torch.testing.assert_close(load_weights(tmp_path / name), weights)
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no plain state dict"):
        load_weights(tmp_path / "list.pth")
    (tmp_path / "noise.pth").write_bytes(b"\x80\x04not weights")
    with pytest.raises(ValueError, match="noise.pth is no file of plain tensors"):
        load_weights(tmp_path / "noise.pth")


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
