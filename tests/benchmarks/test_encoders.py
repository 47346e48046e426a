"""benchmarks/encoders.py with a network that takes no time: rows of every kind, kept, and measured once."""

import sys

import pytest
import torch

from helpers.paths import ROOT


@pytest.fixture
def encoders(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import encoders

    monkeypatch.setattr(encoders, "SIZES", {"b": "vit-ti-16"})
    monkeypatch.setattr(encoders, "MAIN", [("b", 32, (1, 2), None), ("b", 48, (1,), ["float32"])])
    yield encoders
    sys.modules.pop("encoders")


def run(encoders, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["", *words])
    encoders.main()
    lines = capsys.readouterr().out.splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| B") or line.startswith("| 256")]


def test_rows_are_kept_and_their_ratios_follow_from_the_times(encoders, monkeypatch, tmp_path, capsys):
    taken = []

    def measure(runs, rounds, device, seconds=0.3):
        for one in runs.values():
            one()  # every encoder takes these images, forward or backward
        taken.append(rounds)
        return {name: 10.0 + number for number, name in enumerate(runs)}

    monkeypatch.setattr(encoders, "measure", measure)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    words = ["--output", str(tmp_path / "rows.json")]
    first = run(encoders, monkeypatch, capsys, "--main", *words)
    assert [row[:4] for row in first] == [["B", "32", "1", "float32"], ["B", "32", "2", "float32"]] + [
        ["B", "48", "1", "float32"]
    ]
    # ours 10, native 11, timm 12, DINOv2 13, fused 14
    assert first[0][4:11] == ["10.0", "14.0", "11.0", "12.0", "13.0", "0.91", "1.27"]
    count = len(taken)
    assert run(encoders, monkeypatch, capsys, "--main", *words) == first and len(taken) == count
    backward = run(encoders, monkeypatch, capsys, "--backward", "--sides", "32", "--batch-sizes", "1", *words)
    assert backward == [["B", "32", "1", "float32", "10.0", "–", "11.0", "12.0", "13.0", "0.91", "–", "–"]]
    windows = run(encoders, monkeypatch, capsys, "--windows", "--sides", "256", *words)
    assert windows == [["256", "10", "11", "0.91"]] and set(taken) == {3, 5}
