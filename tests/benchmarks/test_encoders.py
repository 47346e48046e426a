"""benchmarks/encoders.py with a network that takes no time: rows of every kind, kept, and measured once."""

import argparse
import sys
import time

import pytest
import torch

from helpers.paths import ROOT


@pytest.fixture
def encoders(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import encoders

    monkeypatch.setattr(encoders, "SIZES", {"b": "vit-ti-16"})
    monkeypatch.setattr(encoders, "MAIN", [("forward", "b", 32, (1, 2)), ("forward+backward", "b", 48, (1,))])
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    yield encoders
    sys.modules.pop("encoders")


def run(encoders, monkeypatch, capsys, *words):
    """The cells of each row, and the lines below the table."""
    monkeypatch.setattr(sys, "argv", ["", *words])
    encoders.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| forward", "| 256"))]
    return rows, [line for line in lines if line.startswith("Left out")]


def test_rows_are_kept_and_their_ratios_follow_from_the_times(encoders, monkeypatch, tmp_path, capsys):
    taken = []

    def measure(runs, options, seconds=0.1):
        for one in runs.values():
            one()  # every encoder takes these images, forward or backward
        taken.append(list(runs))
        # the machine is three times as slow in the second round, which changes no ratio
        return {name: [9.0 + number, 3 * (9.0 + number), 9.0 + number] for number, name in enumerate(runs)}

    monkeypatch.setattr(encoders, "measure", measure)
    monkeypatch.setattr(encoders, "PEAK_SIDE", 64)
    words = ["--output", str(tmp_path / "rows.json")]
    first, _ = run(encoders, monkeypatch, capsys, "--main", *words)
    assert [row[:5] for row in first] == [
        ["forward", "B", "32", "1", "float32"],
        ["forward", "B", "32", "2", "float32"],
        ["forward+backward", "B", "48", "1", "float32"],
    ]
    # the product 9, of a packed matrix 10, ours 11, native 12, timm 13, DINOv2 14, fused 15
    assert first[0][5:12] == ["11.0", "15.0", "12.0", "13.0", "14.0", "0.92", "1.25"]
    assert first[2][5:12] == ["11.0", "–", "12.0", "13.0", "14.0", "0.92", "–"]
    shares = [float(row[-2].removesuffix("%")) for row in first]
    # vit-ti-16, with 4 patches and 5 other tokens; two FLOPs per multiply-add, attention among them
    products = 4 * 768 * 192 + 12 * 9 * (12 * 192**2 + 2 * 9 * 192)
    assert shares[0] == pytest.approx(100 * (2 * products / 11) / (2 * 64**3 / 9), abs=0.51)
    assert shares[1] == pytest.approx(2 * shares[0], abs=1.5)
    assert len(taken) == 3
    assert run(encoders, monkeypatch, capsys, "--main", *words)[0] == first and len(taken) == 3
    backward, _ = run(encoders, monkeypatch, capsys, "--backward", "--sides", "48", "--batch-sizes", "1", *words)
    assert backward == first[2:] and len(taken) == 3
    windows, _ = run(encoders, monkeypatch, capsys, "--windows", "--sides", "256", *words)
    assert windows == [["256", "9", "10", "0.90"]]


def test_a_slow_row_is_left_out_with_a_line(encoders, monkeypatch, tmp_path, capsys):
    words = ["--sides", "32", "--batch-sizes", "1", "--output", str(tmp_path / "rows.json"), "--limit"]
    rows, left_out = run(encoders, monkeypatch, capsys, *words, "0")
    assert not rows and len(left_out) == 1 and "forward b 32 1 float32" in left_out[0]
    monkeypatch.setattr(encoders, "build", None)  # kept: under the same limit it is not tried again
    assert run(encoders, monkeypatch, capsys, *words, "0") == (rows, left_out)


def test_the_ratio_is_that_to_the_fastest_of_the_others(encoders):
    times = {encoders.OURS: [2.0, 4.0, 90.0], **{name: [4.0, 8.0, 9.0] for name in encoders.OTHERS}}
    times["timm's ViT"] = [1.0, 2.0, 30.0]
    assert encoders.ratio(times, encoders.OURS, "timm's ViT") == 2  # of 2, 2, 3: in the same round
    assert encoders.ratio(times, encoders.OURS, "transformers' RADIO") == 0.5


def test_means_over_rows_are_geometric(encoders, capsys):
    ours, native = encoders.OURS, "transformers' RADIO"
    rows = [{ours: [ours_takes], **dict.fromkeys(encoders.OTHERS, [1.0])} for ours_takes in (0.5, 1.0, 2.0)]
    encoders.print_means([*(("forward", row) for row in rows), ("forward+backward", rows[0])])
    lines = capsys.readouterr().out.splitlines()[3:]
    # the logarithms' standard deviation is log 2 = 0.693, over the root of three rows; a single row has none
    assert lines[0] == f"| forward | {native} | 1.000 ± 0.400 | – |" and len(lines) == 3


def test_every_round_is_kept_and_slow_rows_get_fewer(encoders, monkeypatch):
    clock, calls = [0.0], {"quick": 0, "slow": 0}

    def passing(name, seconds):
        def run():
            calls[name] += 1
            clock[0] += seconds * calls[name]

        return run

    monkeypatch.setattr(time, "process_time", lambda: clock[0] * torch.get_num_threads())
    for name, seconds, rounds in (("quick", 0.2, encoders.MOST_ROUNDS), ("slow", 20.0, encoders.FEWEST_ROUNDS)):
        options = argparse.Namespace(device="cpu", rounds=None, seconds=20, limit=25)
        times = encoders.measure({name: passing(name, seconds)}, options)
        # the first pass warms up
        assert times == {name: pytest.approx([1e3 * seconds * (2 + number) for number in range(rounds)])}
    with pytest.raises(encoders.TooSlow):
        encoders.measure({"slow": passing("slow", 500.0)}, options)
