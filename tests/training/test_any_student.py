"""A student without tokens, windows or blocks trains in the same loop, resumes and is published."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpers.conv_student import ConvStudent
from transformers_radio import modeling
from transformers_radio.training import load_recipe, train

OPTIONS = ["loss.balancing=uncertainty", "loss.standardization=phi_s", "loss.statistics_images=24", "ema_decay=0.9"]


@pytest.fixture
def make_conv_recipe(make_recipe, monkeypatch):
    """The tiny recipe with another student."""
    monkeypatch.setitem(modeling.STUDENTS, "conv_student", "helpers.conv_student:ConvStudent")

    def make(name):
        path = make_recipe(name)
        before, _, others = path.read_text().partition("student:")
        student = "student: {type: conv_student, size: large, summary: mean}\n"
        path.write_text(before + student + others[others.index("teachers:") :])
        return load_recipe(path, OPTIONS)

    return make


def test_it_learns_resumes_to_the_bit_and_is_published(make_conv_recipe, tmp_path):
    result = train(make_conv_recipe("whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for term in ("clip/summary", "clip/features", "sam/features"):
        assert lines[-1][term] < lines[0][term]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "student")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000012")
    train(make_conv_recipe("cut"))
    left, right = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "cut"))
    assert left.keys() == right.keys() and not [name for name in left if not torch.equal(left[name], right[name])]

    model = ConvStudent.from_pretrained(result.student_dir).eval()
    output = model(torch.rand(2, 3, 32, 32))
    assert output.summary.shape == (2, 32) and output.adaptors["sam"].features.shape == (2, 16, 20)
