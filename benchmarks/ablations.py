"""The paper's Tables 3, 4 and 5 in miniature, on the quickstart's world: `make ablations`.

Each row is the quickstart's recipe with a few fields changed and fewer steps, over three seeds; the table has the mean
and the standard deviation. A row that is done is kept: the same command goes on after a stop.

    python benchmarks/ablations.py [OUTPUT] [--steps 250] [--seeds 0 1 2] [--only table4]
"""

import argparse
import json
import os
import statistics
from pathlib import Path

from transformers_radio.evaluation.encoder import load_encoder
from transformers_radio.quickstart.measure import Yardstick, measure
from transformers_radio.quickstart.run import RECIPE
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import load_recipe, train

NO_FEATURES = "teachers.{}.feature_weight=0"
RAW = "loss.standardization=none"  # as in the paper, which came before PHI-S
TABLES: dict[str, dict[str, list[str]]] = {
    # SAM has features alone, so that it takes no part here: its weight is as in the other tables.
    "table3": {
        "none": [NO_FEATURES.format("clip"), NO_FEATURES.format("dinov2")],
        "CLIP": [NO_FEATURES.format("dinov2")],
        "DINOv2": [NO_FEATURES.format("clip")],
        "both": [],
    },
    "table4": {
        "naive": [RAW],
        "uncertainty": [RAW, "loss.balancing=uncertainty"],
        "AdaLoss": [RAW, "loss.balancing=adaloss"],
        "AMTML-KD": [RAW, "loss.balancing=amtml_kd"],
        "naive, PHI-S": [],
    },
    "table5": {
        "a CLS token a teacher": ["student.summary=cls_per_teacher"],
        "one CLS token": [],
        "average pooling": ["student.summary=mean"],
    },
}
METRICS = ("Zero-shot", "k-NN", "mIoU", "Masks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/ablations"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=list(TABLES), action="append")
    options = parser.parse_args()
    world = make_world(options.output / "world")
    yardstick = Yardstick(world.directory, load_recipe(RECIPE))
    results_path = options.output / "results.json"
    results = json.loads(results_path.read_text(encoding="utf-8")) if results_path.exists() else {}
    runs = [
        (tuple(row), seed)
        for seed in options.seeds
        for table in options.only or TABLES
        for row in TABLES[table].values()
    ]
    for overrides, seed in dict.fromkeys(runs):  # the unchanged recipe is a row of each table, and is run once
        key = " ".join([f"steps={options.steps}", f"seed={seed}", *overrides])
        if key in results:
            continue
        run = options.output / "runs" / "".join(c if c.isalnum() else "-" for c in key)
        settings = [f"output_dir={run}", f"data.path={world.directory}", f"stages.main.steps={options.steps}"]
        outcome = train(load_recipe(RECIPE, [*settings, f"seed={seed}", *overrides]))
        if outcome.student_dir is None:
            raise SystemExit("stopped; run the same command again to go on")
        results[key] = measure(load_encoder(str(outcome.student_dir), adaptor="clip"), yardstick)
        print(key, json.dumps(results[key]), flush=True)
        temporary = results_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, results_path)
    report = "\n".join(markdown(table, results, options) for table in options.only or TABLES)
    (options.output / "ablations.md").write_text(report, encoding="utf-8")
    print(report)


def markdown(table: str, results: dict[str, dict[str, float | None]], options: argparse.Namespace) -> str:
    lines = [f"| {table} | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, overrides in TABLES[table].items():
        keys = [" ".join([f"steps={options.steps}", f"seed={seed}", *overrides]) for seed in options.seeds]
        cells = []
        for metric in METRICS:
            values = [results[key][metric] or 0.0 for key in keys]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
