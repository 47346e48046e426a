"""Renders the model cards in this folder: `python hub_cards/render.py`; with `--check`, says which are out of date.

Cards of recipes that nobody has trained yet hold no figures. The quickstart's figures are those of the README's table.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from transformers_radio.quickstart.card import add_quickstart
from transformers_radio.training import load_recipe
from transformers_radio.training.plan.count import describe_student, describe_teacher
from transformers_radio.training.run.card import add_licenses, portable_recipe, student_card

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "hub_cards"
RECIPES = {
    "radio-vit-h": "recipes/radio_vit_h16.yaml",
    "radio-vit-l": "recipes/radio_vit_l16.yaml",
    "radio-vit-b": "recipes/radio_vit_b16.yaml",
    "radio-vit-s": "recipes/one_gpu_vit_s16.yaml",
    "e-radio-b": "recipes/e_radio_b.yaml",
    "e-radio-l": "recipes/e_radio_l.yaml",
    "quickstart": "src/transformers_radio/quickstart/recipe_eradio.yaml",
}
MEASURED = "quickstart"


def render(name: str) -> str:
    """The text of one card."""
    path = RECIPES[name]
    recipe = load_recipe(ROOT / path)
    specs = {key: replace(spec, dtype="float32") for key, spec in recipe.teachers.items()}  # instead of auto
    student = describe_student(recipe, {key: describe_teacher(key, spec) for key, spec in specs.items()})
    summarized = {key for key, head in student.config.adaptors.items() if head["summary_dim"] is not None}
    last = list(recipe.stages.values())[-1]
    student.config.preferred_resolution = last.preferred_resolution(summarized)  # as training sets it
    shared = portable_recipe(recipe)
    teachers = {
        key: {"type": spec.type, "checkpoint": spec.checkpoint, "image_size": spec.image_size}
        for key, spec in shared.teachers.items()
    }
    manifest = add_licenses(teachers, recipe)
    untrained = None if name == MEASURED else path
    card = student_card(student, shared, manifest, title=name, untrained=untrained)
    sources = [source.path.removeprefix("local:") for source in shared.data.named_sources().values()]
    card.data.datasets = sources
    if name == MEASURED:
        add_quickstart(card, *_readme_table())
    return f"{str(card).rstrip()}\n"


def _readme_table() -> tuple[str, dict[str, float | None]]:
    """The README's table of the quickstart with notes and picture, and the row of the student."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Quickstart results\n")[2].partition("\n## ")[0].strip()
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    columns, student = rows[0], next(row for row in rows if row[0] == "RADIO student")
    figures = {
        column: float(cell) for column, cell in zip(columns, student, strict=True) if re.fullmatch(r"[\d.]+", cell)
    }
    return section.replace("](docs/", "](../docs/"), dict(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Write nothing; fail if a card is out of date.")
    check = parser.parse_args().check
    stale = []
    for name in RECIPES:
        path, text = FOLDER / f"{name}.md", render(name)
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(path.name)
        elif not check:
            path.write_text(text, encoding="utf-8")
            print(path)
    if stale:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python hub_cards/render.py")


if __name__ == "__main__":
    main()
