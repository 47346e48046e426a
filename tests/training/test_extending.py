"""docs/extending.md, as it stands: its student learns from its teacher with its loss, and its task measures it."""

import json
import re
import sys

import pytest
import yaml

from helpers.paths import ROOT
from transformers_radio.evaluation.run import TASKS, run_task
from transformers_radio.modeling import STUDENTS, student_class
from transformers_radio.training import checks, distill, load_recipe, losses, train


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Files that the page names in the first line of an example, importable; and its other examples, in order."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    lines = []
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        file = re.match(r"# (\w+\.py)\n", example)
        if file is None:
            lines.append(example)
        else:
            (tmp_path / file[1]).write_text(example)
            monkeypatch.delitem(sys.modules, file[1].removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lines


def test_the_page_works_as_it_stands(page, tmp_path, image_folder, monkeypatch):
    student_line, term_lines, task_line = page
    for known, name in ((STUDENTS, "convolutional"), (TASKS, "brightness"), (losses.LOSSES, "gram")):
        monkeypatch.setitem(known, name, None)  # which the page's lines replace, and the end of the test removes
    exec(student_line, {"STUDENTS": STUDENTS})
    exec(task_line, {"TASKS": TASKS})
    usual_terms = losses.loss_terms

    def loss_terms(*arguments):
        from gram import gram_loss

        terms = usual_terms(*arguments)
        exec(term_lines, {"LOSSES": losses.LOSSES, "gram_loss": gram_loss, "terms": terms, "Term": losses.Term})
        return terms

    for module in (checks, distill):
        monkeypatch.setattr(module, "loss_terms", loss_terms)
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "student": {"type": "convolutional", "size": "small"},
        "teachers": {"edges": {"type": "python", "checkpoint": "edges:Edges"}},
        "data": {"path": str(image_folder), "num_workers": 0},
        "stages": {"main": {"steps": 30, "resolution": 64, "batch_size": 8}},
        "log_every_steps": 10,
        "tracker": None,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    folder = train(load_recipe(tmp_path / "recipe.yaml", trust_code=True)).student_dir
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1]["edges/features"] < logged[0]["edges/features"] and logged[-1]["edges/gram"] > 0

    assert type(student_class("convolutional").from_pretrained(folder)).__name__ == "ConvolutionalModel"
    (result,) = run_task("brightness", [str(folder)], output=tmp_path / "eval", overrides=["gray=0.2"])
    assert result.kind == "student" and result.params > 1000
    assert run_task("brightness", [str(folder)], output=tmp_path / "eval", overrides=["gray=0.2"]) == [result]
    with pytest.raises(ValueError, match=r"gray \(0.2 there, 0.3 here\)"):
        run_task("brightness", [str(folder)], output=tmp_path / "eval", overrides=["gray=0.3"])
