"""The paper's Tables 3, 4 and 5 in miniature, and a few options, on the quickstart's world: `make ablations`.

As in the paper CLIP and DINOv2 teach, all losses at weight 1, without PHI-S; each row changes a few
fields of that. The tables have the mean and the standard deviation over the seeds. A row that is done is kept: the
same command goes on after a stop.

    python benchmarks/ablations.py [OUTPUT] [--steps 200] [--seeds 0 1 2] [--only table4]
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

from measured_rows import mean_and_spread, measure_row

from transformers_radio.quickstart.measure import Yardstick
from transformers_radio.quickstart.run import VIT_RECIPE
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import Recipe, load_recipe
from transformers_radio.training.recipe import StageRecipe

BASE = ["loss.standardization=none"] + [
    f"teachers.{teacher}.{head}_weight=1" for teacher in ("clip", "dinov2") for head in ("summary", "feature")
]
TABLES: dict[str, dict[str, list[str]]] = {
    "table3": {
        "features of neither": ["teachers.clip.feature_weight=0", "teachers.dinov2.feature_weight=0"],
        "features of CLIP": ["teachers.dinov2.feature_weight=0"],
        "features of DINOv2": ["teachers.clip.feature_weight=0"],
        "features of both": [],
    },
    "table4": {
        "naive": [],
        "uncertainty": ["loss.balancing=uncertainty"],
        "AdaLoss": ["loss.balancing=adaloss"],
        "AMTML-KD": ["loss.balancing=amtml_kd"],
        "naive, PHI-S": ["loss.standardization=phi_s"],
    },
    "table5": {
        "one CLS token": [],
        "a CLS token a teacher": ["student.summary=cls_per_teacher"],
        "average pooling": ["student.summary=mean"],
    },
    # not in the paper
    "options": {
        "none": [],
        "weight noise 0.01": ["student.weight_noise=0.01"],
        "only heads learn in the first 20 steps": ["stages.main.freeze_trunk_steps=20"],
        "compared on the smaller grid": ["loss.grid=smaller"],
    },
}
METRICS = ("Zero-shot", "k-NN", "mIoU")


def row_recipe(world: Path, steps: int, seed: int, overrides: list[str]) -> Recipe:
    recipe = load_recipe(VIT_RECIPE, [f"data.path={world}", f"seed={seed}", *BASE, *overrides])
    del recipe.teachers["sam"]
    frozen = recipe.stages["main"].freeze_trunk_steps
    stage = StageRecipe(steps, 64, 32, warmup_steps=steps // 10, freeze_trunk_steps=frozen)
    recipe.stages = {"main": stage}
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=list(TABLES), action="append")
    options = parser.parse_args()
    world = make_world(options.output / "world").directory
    yardstick = Yardstick(world, load_recipe(VIT_RECIPE))
    tables = {name: TABLES[name] for name in options.only or TABLES}
    results: dict[tuple[str, ...], list[dict[str, float | None]]] = {}
    for seed in options.seeds:
        # the unchanged recipe is a row of each table, and is run once
        for overrides in dict.fromkeys(tuple(row) for rows in tables.values() for row in rows.values()):
            recipe = row_recipe(world, options.steps, seed, list(overrides))
            row = measure_row(recipe, options.output / "runs", yardstick)
            metrics = {name: row[name] for name in METRICS}
            results.setdefault(overrides, []).append(metrics)
            print(f"seed {seed}, {' '.join(overrides) or 'unchanged'}: {json.dumps(metrics)}", flush=True)
    report = "\n".join(markdown(name, rows, results) for name, rows in tables.items())
    (options.output / "ablations.md").write_text(report, encoding="utf-8")
    print(report)


def markdown(
    table: str, rows: dict[str, list[str]], results: dict[tuple[str, ...], list[dict[str, float | None]]]
) -> str:
    lines = [f"| {table} | " + " | ".join(METRICS) + " |", "|---" + "|---:" * len(METRICS) + "|"]
    for name, overrides in rows.items():
        of_seeds = results[tuple(overrides)]
        cells = [mean_and_spread([metrics[metric] for metrics in of_seeds]) for metric in METRICS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
