"""Throughput under a clock that the test turns, and under the real one."""

import time

import pytest
import torch
from torch import nn

from transformers_radio.evaluation import throughput, throughput_conditions


def test_median_over_interleaved_rounds_without_the_warmup(monkeypatch):
    now = 0.0
    calls = []
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def model(name, seconds):
        def forward(images):
            nonlocal now
            round_number = calls.count(name)
            calls.append(name)
            assert not torch.is_grad_enabled()
            now += 100 if round_number in (0, 3) else seconds  # a slow first call, and one hiccup later

        return forward

    inputs = {"a": torch.zeros(4, 3, 8, 8), "b": torch.zeros(2, 3, 8, 8)}
    result = throughput({"a": model("a", 0.5), "b": model("b", 0.125)}, inputs, repeats=5, warmup=1)
    assert calls == ["a", "b"] * 6
    assert result == {"a": 8, "b": 16}
    assert throughput({"a": model("c", 0.5)}, {"a": inputs["a"]}, repeats=1, warmup=0) == {"a": 0.04}
    assert throughput({"a": model("d", 0.5)}, {"a": inputs["a"]}, repeats=1, warmup=1) == {"a": 8}


def test_real_time_is_measured():
    result = throughput({"m": lambda images: time.sleep(0.05)}, {"m": torch.zeros(3, 3, 8, 8)}, repeats=3, warmup=0)
    assert 20 < result["m"] <= 3 / 0.05


def test_conditions_state_batch_resolution_dtype_and_threads():
    model = nn.Conv2d(3, 1, 1).to(torch.bfloat16)
    threads = torch.get_num_threads()
    assert (
        throughput_conditions(model, torch.zeros(8, 3, 32, 48)) == f"batch 8, 32x48, bfloat16, cpu ({threads} threads)"
    )
    assert "float32" in throughput_conditions(lambda x: x, torch.zeros(8, 3, 32, 48))


def test_bad_input_is_named():
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"same names; got \['a'\] and \['b'\]"):
        throughput({"a": nn.Identity().eval()}, {"b": images})
    with pytest.raises(ValueError, match="'a' is in training mode"):
        throughput({"a": nn.Identity()}, {"a": images})
    with pytest.raises(ValueError, match="repeats is 0"):
        throughput({"a": nn.Identity().eval()}, {"a": images}, repeats=0)
