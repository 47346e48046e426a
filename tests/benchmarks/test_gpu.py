"""benchmarks/gpu.py: its dry run, and parts that fail, hang, die or have no time."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
BROKEN = """
import os, signal, time
import torch
from measure import Case, NotThereError

def fails(error):
    raise error

def cases(setup):
    return [
        Case("first", lambda: {"ms": 1.0}),
        Case("raises", lambda: fails(RuntimeError("the reason\\nand more"))),
        Case("large", lambda: fails(torch.OutOfMemoryError("out of memory"))),
        Case("lacks", lambda: __import__("no_such_library")),
        Case("planned", lambda: fails(NotThereError("later"))),
        Case("wrong", lambda: {"status": "FAIL", "error": 1.0}),
        Case("dies", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
        Case("hangs", lambda: time.sleep(600), limit=0.25),
        Case("last", lambda: [{"name": "last, twice", "ms": 2.0}, {"name": "last, again", "ms": 3.0}]),
    ]
"""
SLOW = """
import time
from measure import Case

def cases(setup):
    return [Case("one", lambda: time.sleep(600), limit=600), Case("two", lambda: {})]
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script as a module, whose parts may also be files of tmp_path."""
    for folder in (BENCHMARKS, BENCHMARKS / "gpu_parts", tmp_path):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return importlib.import_module("gpu")


def run(gpu, monkeypatch, out, *parts, seconds=120):
    monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(name, name, 1) for name in parts))
    code = gpu.main(["--dry", "--out", str(out), "--seconds", str(seconds)])
    return code, json.loads((out / "gpu.json").read_text())["rows"]


def test_dry_run_measures_everything(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = {(row["part"], row["name"]): row for row in report["rows"]}
    counts = Counter(part for part, _ in rows)
    assert list(counts) == ["ceilings", "parity", "encoders", "efficient", "training", "quickstart"]
    left_out = {name for (_, name), row in rows.items() if row["status"] != "ok"}
    assert all("flash_attention_2" in name for name in left_out)
    assert counts["parity"] == 23 and counts["training"] == 9
    assert {name for part, name in rows if part == "quickstart"} >= {"CLIP", "DINOv2", "SAM", "student, 2 steps"}
    waits = rows["training", "synchronizations"]
    assert waits["in a step"] > 0 and "log.py:" in waits["places"]
    assert all(f"| {name} |" in done.stdout for _, name in rows)  # the table
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] and "--dry" in report["command"]
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_what_fails_is_a_row_and_the_rest_goes_on(gpu, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "unimportable.py").write_text("import no_such_library")
    code, rows = run(gpu, monkeypatch, tmp_path / "out", "broken", "unimportable")
    assert code == 1
    assert [(row["name"], row["status"]) for row in rows] == [
        ("first", "ok"),
        ("raises", "error"),
        ("large", "does not fit"),
        ("lacks", "not installed"),
        ("planned", "not there"),
        ("wrong", "FAIL"),
        ("dies", "killed"),
        ("hangs", "hung"),
        ("last, twice", "ok"),
        ("last, again", "ok"),
        ("unimportable", "killed"),
    ]
    reasons = {row["name"]: row.get("reason") for row in rows}
    assert reasons["raises"] == "RuntimeError: the reason"
    assert reasons["dies"].startswith("signal 11")
    assert reasons["hangs"] == "no answer within 1 seconds"
    assert "no_such_library" in reasons["unimportable"]


def test_no_time_is_no_failure(gpu, monkeypatch, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    code, rows = run(gpu, monkeypatch, tmp_path / "out", "slow", "slow", "slow", seconds=20)
    assert code == 0
    # in a dry run two parts are side by side, and the third finds no time at all
    assert sorted(row["name"] for row in rows) == ["one", "one", "slow", "two", "two"]
    assert {row["status"] for row in rows} == {"no time"}


def test_a_signal_ends_all_processes(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry", "--out", str(tmp_path), "--only", "training"]
    script = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    children = []
    while not children:
        time.sleep(0.1)
        children = subprocess.run(["pgrep", "-P", str(script.pid)], capture_output=True, text=True).stdout.split()
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(children[0]), 0)


def test_parity_notices_another_result(gpu, monkeypatch):
    parity, measure = (importlib.import_module(name) for name in ("parity", "measure"))
    setup = measure.Setup(torch.device("cpu"), dry=True)
    assert parity.forward_parity("whole", torch.float32, "sdpa", setup)["status"] == "ok"
    assert parity.training_parity(torch.float32, "sdpa", setup)["status"] == "ok"
    student = parity.student

    def changed(*arguments):
        model = student(*arguments)
        model.encoder.layer[1].attention.scaling *= 1.1
        return model

    monkeypatch.setattr(parity, "student", changed)
    assert parity.forward_parity("whole", torch.float32, "sdpa", setup)["status"] == "FAIL"
    assert parity.training_parity(torch.float32, "sdpa", setup)["status"] == "FAIL"
    assert parity.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


def test_backbones_of_the_papers_table_take_its_images(gpu):
    efficient = importlib.import_module("efficient")
    paper = {"EfficientNetV2-S": 21, "RegNetY-064": 30, "ConvNext-B": 88, "NFNet-F3": 254, "SwinV2-S": 49}
    paper |= {"ResNetv2-101": 44, "MaxViT-B": 119, "PoolformerV2-M36": 56, "MViTV2-B": 51}
    paper |= {efficient.CLIP_H: 632, efficient.DINOV2_G: 1140}
    for name in efficient.MODELS:
        with torch.device("meta"):
            model = efficient.build(name, dry=False).eval()
            output = model(torch.empty(1, 3, efficient.SIDE, efficient.SIDE))
        assert output.shape[0] == 1
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert millions == pytest.approx(paper.get(name, millions), rel=0.05)
