"""torch.compile of student and teachers is a recipe's choice that changes no result."""

import functools

import pytest
import torch
from safetensors.torch import load_file

from transformers_radio.training import load_recipe, train


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_ends_with_the_same_student(backend, make_recipe, tmp_path, monkeypatch):
    """aot_eager traces forward and backward as inductor does, and needs no C++ compiler."""
    options = ["stages.main.steps=4", "student.config.pos_dropout=0"]
    train(load_recipe(make_recipe("eager"), options))
    calls = []
    compile_ = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", lambda function: calls.append(function) or compile_(function))
    train(load_recipe(make_recipe("compiled"), [*options, "student.compile=true", "teachers.clip.compile=true"]))
    assert len(calls) == 5  # a teacher; two blocks of the student that is trained, and of the one that is tried before
    eager, compiled = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("eager", "compiled"))
    assert eager.keys() == compiled.keys()
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=1e-4, atol=1e-5, msg=name)


def test_all_blocks_are_compiled_with_spectral_reparametrization(make_recipe, monkeypatch):
    """Each block then is a frame of its own, of more than torch compiles by default."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    blocks = ["student.config.num_hidden_layers=5", "student.config.pos_dropout=0"]
    options = [*blocks, "student.spectral_reparam=true", "student.compile=true", "stages.main.steps=2"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(load_recipe(make_recipe(), [*options, "stages.main.warmup_steps=1"]))
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 5
    assert not torch._dynamo.utils.counters["unimplemented"]
