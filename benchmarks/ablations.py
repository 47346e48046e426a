"""The paper's Tables 3, 4 and 5 in miniature on the quickstart's world: `make ablations`.

As in the paper CLIP and DINOv2 teach. The recipe is that of the quickstart's ViT, whose losses are weighted and whose
targets are standardized (PHI-S); each row changes a few fields of it. The tables have the mean and the standard
deviation over the seeds. A row that is done is kept: the same command goes on after a stop.

    python benchmarks/ablations.py [OUTPUT] [--steps 400] [--seeds 0 1 2] [--only table4]
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

# Both teachers see all images here; in the quickstart DINOv2 has a ninth of them, and twice the weight for that.
BASE = ["teachers.dinov2.summary_weight=1", "teachers.dinov2.feature_weight=1"]
PLAIN = ["loss.standardization=none", "teachers.clip.summary_weight=1", "teachers.clip.feature_weight=1"]
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
        "all weights 1, no PHI-S: naive": PLAIN,
        "all weights 1, no PHI-S: uncertainty": [*PLAIN, "loss.balancing=uncertainty"],
        "all weights 1, no PHI-S: AdaLoss": [*PLAIN, "loss.balancing=adaloss"],
    },
    "table5": {
        "one CLS token": [],
        "one CLS token per teacher": ["student.summary=cls_per_teacher"],
        "average pooling": ["student.summary=mean"],
    },
}
METRICS = ("Zero-shot", "k-NN", "mIoU")


def row_recipe(output: Path, steps: int, seed: int, overrides: list[str]) -> Recipe:
    """CLIP and DINOv2 at 64 pixels, 32 images a step."""
    places = [f"data.path={output}/world", f"teacher_cache={output}/teachers"]
    recipe = load_recipe(VIT_RECIPE, [*places, f"seed={seed}", *BASE, *overrides])
    del recipe.teachers["sam"]
    recipe.stages = {"main": StageRecipe(steps, 64, 32, warmup_steps=steps // 10)}
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=400)
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
            recipe = row_recipe(options.output, options.steps, seed, list(overrides))
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
