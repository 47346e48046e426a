"""docs/recipes.md lists every file in recipes/ once, and says of each recipe what the file says."""

import re

import pytest

from helpers.documents import PAGES
from helpers.paths import ROOT
from transformers_radio.training import load_recipe

FOLDER = ROOT / "recipes"
FILES = sorted(FOLDER.rglob("*.yaml"))
RECIPES = [path for path in FILES if path.parent.name not in ("accelerate", "evaluation")]
PAGE = PAGES["recipes.md"].read_text(encoding="utf-8")


def row_of(path):
    """The cells of a recipe's row from the third on: student and teachers, images, steps and GPUs."""
    recipe = load_recipe(path)
    processes, gpu = re.search(r"^# processes: (\d+), gpu: (\S+)$", path.read_text(), re.MULTILINE).groups()
    student = " ".join(filter(None, (recipe.student.type, recipe.student.size)))
    images = ", ".join(recipe.data.sources) or recipe.data.path
    steps = " + ".join(f"{stage.steps // 1000}k" for stage in recipe.stages.values())
    return [f"{student} from {', '.join(recipe.teachers)}", images, f"{steps} on {processes} x {gpu}"]


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_every_file_is_listed_once(path):
    assert PAGE.count(f"](../recipes/{path.relative_to(FOLDER)})") == 1


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_the_row_of_a_recipe_says_what_the_file_says(path):
    link = f"](../recipes/{path.relative_to(FOLDER)})"
    row = next(line for line in PAGE.splitlines() if link in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][2:] == row_of(path)


def test_no_other_recipe_is_listed():
    linked = set(re.findall(r"\]\(\.\./recipes/([\w/.-]+\.yaml)\)", PAGE))
    assert linked == {str(path.relative_to(FOLDER)) for path in FILES}
