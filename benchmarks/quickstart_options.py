"""Recipe fields that are off by default, each as a row of the quickstart's recipe over three seeds.

    python benchmarks/quickstart_options.py [OUTPUT] [--steps 250] [--seeds 0 1 2] [--only NAME ...]

The table has the mean and the standard deviation over the seeds. A row that is done is kept: the same command goes on
after a stop.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

from measured_rows import mean_and_spread, measure_row

from transformers_radio.disk import write_text
from transformers_radio.quickstart.measure import Yardstick
from transformers_radio.quickstart.run import STUDENTS
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import load_recipe

RECIPE = STUDENTS["eradio"][0]
OPTIONS: dict[str, list[str]] = {
    "the quickstart's recipe": [],
    "ema_decay: 0.98": ["ema_decay=0.98"],
    "grid: smaller": ["loss.grid=smaller"],
}
METRICS = ("Zero-shot", "k-NN", "mIoU", "Masks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/quickstart-options"))
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), metavar="NAME")
    options = parser.parse_args()
    output: Path = options.output
    yardstick = Yardstick(make_world(output / "world").directory, load_recipe(RECIPE))
    places = [f"data.path={output}/world", f"teacher_cache={output}/teachers"]
    length = [f"stages.main.steps={options.steps}", f"stages.main.warmup_steps={options.steps // 10}"]
    rows: dict[str, list[dict[str, float | None]]] = {name: [] for name in options.only}
    for seed in options.seeds:
        for name in options.only:
            recipe = load_recipe(RECIPE, [*places, *length, f"seed={seed}", *OPTIONS[name]])
            row = measure_row(recipe, output / "runs", yardstick)
            rows[name].append(row)
            print(f"seed {seed}, {name}: {json.dumps({metric: row[metric] for metric in METRICS})}", flush=True)
    report = ["| | " + " | ".join(METRICS) + " |", "|---" + "|---:" * len(METRICS) + "|"]
    for name, of_seeds in rows.items():
        cells = [mean_and_spread([row[metric] for row in of_seeds]) for metric in METRICS]
        report.append(f"| {name} | {' | '.join(cells)} |")
    write_text(output / "options.md", "\n".join(report) + "\n")
    print("\n".join(report))


if __name__ == "__main__":
    main()
