"""A teacher of one's own: 15 lines in a module, named by `module:Class`."""

import sys

import pytest
import torch

from transformers_radio.teachers import Teacher, build_teacher

MINE = """
import torch
from transformers_radio.teachers import Teacher, TeacherOutput

class Colors(Teacher):
    @classmethod
    def from_checkpoint(cls, checkpoint, image_size=None, dtype="float32", width=6):
        network = torch.nn.Conv2d(3, width, 8, stride=8)
        if checkpoint != "random":
            network.load_state_dict(torch.load(checkpoint, weights_only=True))
        teacher = cls(network, image_size=image_size or 32, patch_size=8, summary_dim=width, feature_dim=width,
                      normalization=([0.5, 0.5, 0.5], [0.25, 0.25, 0.25]))
        return teacher.cast(dtype)

    def encode(self, pixel_values):
        maps = self.model(pixel_values)
        return TeacherOutput(maps.mean((2, 3)), maps.flatten(2).mT, tuple(maps.shape[2:]))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_teachers.py").write_text(MINE + "\n\nclass NoTeacher:\n    pass\n")
    (tmp_path / "my_broken.py").write_text("import a_library_that_does_not_exist\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    return tmp_path


def test_it_takes_15_lines():
    assert len([line for line in MINE.splitlines() if line.strip()]) <= 15


def test_your_own_teacher(module, images, assert_contract):
    network = torch.nn.Conv2d(3, 6, 8, stride=8)
    torch.save(network.state_dict(), module / "weights.pt")
    teacher = build_teacher("python", str(module / "weights.pt"), target="my_teachers:Colors")
    assert isinstance(teacher, Teacher)
    output = assert_contract(teacher)
    with torch.no_grad():
        maps = network((images(32) - 0.5) / 0.25)
    assert output.grid == (4, 4)
    torch.testing.assert_close(output.summary, maps.mean((2, 3)))
    torch.testing.assert_close(output.features, maps.flatten(2).transpose(1, 2))


def test_options_size_and_dtype_reach_the_class(module):
    teacher = build_teacher("python", "random", 64, "bfloat16", target="my_teachers:Colors", width=4)
    assert (teacher.image_size, teacher.feature_dim, teacher.model.weight.dtype) == (64, 4, torch.bfloat16)


def test_the_class_as_checkpoint(module):
    (module / "my_teachers.py").write_text(MINE.replace('checkpoint != "random"', "False"))
    assert build_teacher("python", "my_teachers:Colors").feature_dim == 6


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("my_teachers.Colors", {}, "'my_teachers.Colors' names no class: write module:Class"),
        ("no_such_module:Colors", {}, "no module 'no_such_module': put it on PYTHONPATH"),
        ("my_teachers:Colour", {}, "module 'my_teachers' has no 'Colour'"),
        ("my_teachers:NoTeacher", {}, "my_teachers:NoTeacher is no subclass of transformers_radio.teachers.Teacher"),
        ("my_teachers:Colors", {"depth": 2}, "my_teachers:Colors does not know 'depth': its options are width"),
    ],
)
def test_wrong_target(module, target, options, message):
    with pytest.raises(ValueError, match=message):
        build_teacher("python", "random", target=target, **options)


def test_a_broken_module_says_what_it_lacks(module):
    with pytest.raises(ModuleNotFoundError, match="a_library_that_does_not_exist"):
        build_teacher("python", "random", target="my_broken:Colors")
