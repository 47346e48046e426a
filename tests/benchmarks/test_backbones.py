"""benchmarks/backbones.py with networks that take no time: its table, its fronts and its picture."""

import sys
from itertools import permutations

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from helpers.paths import ROOT


@pytest.fixture
def backbones(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import backbones

    monkeypatch.setattr(backbones, "SIDE", 32)
    monkeypatch.setattr(backbones, "SECONDS", 0.001)
    yield backbones
    sys.modules.pop("backbones")


def test_the_table_has_the_papers_ratios_beside_ours(backbones, monkeypatch, tmp_path, capsys):
    rows = {
        name: backbones.Row(lambda: nn.Conv2d(3, 2, 3, padding=1), row.paper, row.channels_last)
        for name, row in backbones.ROWS.items()
        if name in (backbones.CLIP, backbones.DINO, "E-RADIO-B", "E-RADIO-L", "E-RADIO-XT")
    }
    monkeypatch.setattr(backbones, "ROWS", rows)
    picture = tmp_path / "fronts.png"
    monkeypatch.setattr(
        sys, "argv", ["", "--rows", *rows, "--rounds", "2", "--batch-sizes", "1", "3", "--picture", str(picture)]
    )
    backbones.main()
    table = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    cells = {row[0]: row[1:] for row in table}
    assert cells["E-RADIO-B"][1] == "0.0" and len(cells["E-RADIO-B"]) == 2 + 2 * 3
    published = {name: [cell.split("(")[1:] for cell in cells[name][3:5]] for name in rows}
    assert published["E-RADIO-B"] == [["11.6)"], ["20.5)"]]
    assert published["E-RADIO-L"] == [["6.2)"], ["11.1)"]]
    assert published["E-RADIO-XT"] == [[], []]
    assert cells[backbones.CLIP][3] == "1.00 (1.0)"
    assert min(Image.open(picture).size) > 500
    monkeypatch.setattr(sys, "argv", ["", "--picture", "fronts.txt"])
    with pytest.raises(SystemExit):
        backbones.main()
    assert "expected a name that ends in .png or .pdf" in capsys.readouterr().err


def test_parameters_and_flops_are_counted(backbones, monkeypatch):
    monkeypatch.setattr(backbones, "ROWS", {"one": backbones.Row(lambda: nn.Conv2d(3, 2, 3, padding=1))})
    timed = backbones.compare(["one"], 3, [2], torch.device("cpu"))["one"]
    assert timed.parameters == 2 * 3 * 9 + 2
    assert timed.flops == 2 * 32 * 32 * 2 * 3 * 9  # 2 FLOPs a multiply-add
    assert len(timed.rates[2]) == 3 and timed.rate(2) == sorted(timed.rates[2])[1]


def test_a_front_has_the_points_that_no_other_beats_in_both(backbones):
    points = {"fast": (9.0, 1.0), "beaten": (4.0, 2.0), "good": (5.0, 3.0), "slow": (1.0, 3.0), "best": (0.5, 7.0)}
    for order in permutations(points):
        assert backbones.pareto_front({name: points[name] for name in order}) == ["fast", "good", "best"]
    assert backbones.pareto_front({"a": (1.0, 1.0), "b": (1.0, 2.0)}) == ["b"]


def test_every_network_of_timm_has_its_name(backbones, monkeypatch):
    made = []
    monkeypatch.setattr(timm, "create_model", lambda name, **options: made.append(name) or nn.Identity())
    with torch.device("meta"):
        for name, row in backbones.ROWS.items():
            if "RADIO" not in name and name != backbones.DINO:
                row.build()
    assert len(made) == 11 and all(timm.is_model(name) for name in made)
