"""The quickstart over three seeds: `make seeds`. Prints a row for each seed and the mean with its range.

    python benchmarks/quickstart_seeds.py [OUTPUT] [FIELD=VALUE ...]

The images and the teachers are the same for all; the seed changes the start, the order of the images, and the crops.
Fields of the recipe hold for all seeds.
"""

import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

from transformers_radio.data import USER_ERRORS, one_line
from transformers_radio.evaluation.report.table import Row, Table
from transformers_radio.quickstart.run import run_quickstart

SEEDS = (0, 1, 2)


def main(output: Path, overrides: list[str]) -> None:
    rows: list[Row] = []
    teachers: list[Row] = []
    for seed in SEEDS:
        started = time.monotonic()
        table = run_quickstart(output, [f"seed={seed}", f"output_dir={output}/seed-{seed}", *overrides])
        if table is None:
            raise SystemExit("stopped; run the same command again to go on")
        *teachers, student = table.rows
        minutes = (time.monotonic() - started) / 60
        rows.append(Row(f"student, seed {seed}", student.params, student.resolution, None, student.metrics))
        print(f"seed {seed}: {minutes:.1f} minutes", flush=True)
    names = rows[0].metrics
    mean = {name: statistics.mean(row.metrics[name] or 0.0 for row in rows) for name in names}
    best = {name: max((row.metrics.get(name) or 0.0 for row in teachers), default=0.0) for name in names}
    share = {name: 100 * mean[name] / best[name] for name in names}
    rows = [
        *(Row(row.model, row.params, row.resolution, None, row.metrics) for row in teachers),
        *rows,
        Row("student, mean", metrics=mean),
        Row("student, % of the best teacher", metrics=share),
    ]
    table = Table(f"Quickstart over the seeds {', '.join(map(str, SEEDS))}", rows)
    (output / "seeds.md").write_text(table.to_markdown(), encoding="utf-8")
    print(table.to_markdown())


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if "=" not in argument]
    fields = [argument for argument in sys.argv[1:] if "=" in argument]
    if len(folders) > 1 or any(field.startswith(("seed=", "output_dir=")) for field in fields):
        raise SystemExit(f"error: expected one folder, and fields other than seed and output_dir, not {sys.argv[1:]}")
    try:
        main(Path(folders[0] if folders else "runs/quickstart-seeds"), fields)
    except USER_ERRORS as error:
        raise SystemExit(f"error: {one_line(error)}") from error
