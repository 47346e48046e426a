"""benchmarks/backbone_study.py: its rows are complete recipes, and its table says what the results say."""

import statistics
import sys

import numpy as np
import pytest

from helpers.paths import ROOT
from transformers_radio.modeling import STUDENTS as STUDENT_TYPES
from transformers_radio.training.recipe import recipe_to_dict
from transformers_radio.training.recipe.validate import validate


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield __import__("backbone_study")
    for name in ("backbone_study", "measured_rows"):
        sys.modules.pop(name, None)


def rows(loss, miou):
    shared = {"Zero-shot": 2 * miou, "k-NN": 60.0 + miou, "Masks": None, "dinov2/features": loss}
    return [{**shared, "mIoU": miou + off} for off in (-1, 1)]


def test_every_row_is_a_valid_recipe_that_differs_in_its_student_alone(study, tmp_path):
    base = study.base_recipe(tmp_path / "world", tmp_path, 20, 1)
    base.output_dir = str(tmp_path / "run")
    plain = recipe_to_dict(base)
    for name in study.STUDENTS:
        recipe = study.student_recipe(base, name)
        validate(recipe)
        assert recipe.student.type in STUDENT_TYPES
        assert {**recipe_to_dict(recipe), "student": plain["student"]} == plain
    alone, beside = (study.from_proxy_recipe(base, name, tmp_path) for name in study.FROM_PROXY)
    for recipe in (alone, beside):
        validate(recipe)
        assert recipe.student == study.STUDENTS["ViT"]
    assert (
        {teacher.options["adaptor"] for teacher in alone.teachers.values()}
        == set(base.teachers)
        == set(alone.teachers)
    )
    assert len(beside.teachers) == 6 and beside.teachers["clip"] == base.teachers["clip"]


def test_the_table_has_means_spreads_and_the_correlation(study, tmp_path):
    losses, mious = {"ViT": 0.3, "E-RADIO": 0.2, "ConvNeXt": 0.4}, {"ViT": 30.0, "E-RADIO": 41.0, "ConvNeXt": 22.0}
    results = {name: rows(losses[name], mious[name]) for name in losses}
    results["ViT, the proxy"] = rows(0.1, 0.0)[:1]  # larger, and no part of the correlation
    rates = dict.fromkeys(results, 100.0) | {"ConvNeXt": 120.0}
    table = study.markdown(results, dict.fromkeys(results, 1.9), rates)
    assert (
        f"| E-RADIO | 1.90 | 100 | 82.0 ± 0.0 | 101.0 ± 0.0 | 41.0 ± {statistics.stdev([40, 42]):.1f} |  | 0.200"
        in table
    )
    expected = np.corrcoef(list(losses.values()), list(mious.values()))[0, 1]
    assert study.correlation(results, "mIoU") == pytest.approx(expected)
    assert f"mIoU {expected:.2f}" in table and "Masks" not in table.splitlines()[-1]
    study.draw(results, rates, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_the_front_has_those_that_none_beats_in_both(study):
    x = {"ViT": 10.0, "E-RADIO": 20.0, "ConvNeXt": 15.0, "RegNetY": 30.0}
    y = {"ViT": 9.0, "E-RADIO": 8.0, "ConvNeXt": 7.0, "RegNetY": 1.0}
    assert study.front(x, y) == ["ViT", "E-RADIO", "RegNetY"]
