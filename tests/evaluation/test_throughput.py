"""Throughput of callables whose speed is known, and the order in which they run."""

import time

import pytest
import torch
from torch import nn

from transformers_radio.evaluation import throughput, throughput_conditions


def test_median_images_per_second_of_known_sleeps():
    calls = []

    def slow(images):
        calls.append("slow")
        time.sleep(0.5 if len(calls) == 5 else 0.02)  # one hiccup in a timed round, which the median must not see

    def slower(images):
        calls.append("slower")
        time.sleep(0.06)

    inputs = {"slow": torch.zeros(4, 3, 8, 8), "slower": torch.zeros(2, 3, 8, 8)}
    result = throughput({"slow": slow, "slower": slower}, inputs, repeats=5, warmup=1)
    assert calls == ["slow", "slower"] * 6  # interleaved, warm-up included
    assert result["slow"] == pytest.approx(4 / 0.02, rel=0.3)
    assert result["slower"] == pytest.approx(2 / 0.06, rel=0.3)


def test_warmup_is_not_timed_and_no_gradient_is_kept():
    seen = []

    def model(images):
        seen.append(torch.is_grad_enabled())
        time.sleep(0.3 if len(seen) == 1 else 0.01)

    result = throughput({"m": model}, {"m": torch.zeros(1, 3, 8, 8)}, repeats=1, warmup=1)
    assert result["m"] > 1 / 0.1 and seen == [False, False]


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
