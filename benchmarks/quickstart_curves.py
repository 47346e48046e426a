"""What bounds the quickstart's student: its columns over steps and over width, and the ceiling of the masks.

    python benchmarks/quickstart_curves.py [OUTPUT] [--seed 0] [--only steps width ceiling]

Every row is the quickstart's recipe with a few fields changed. The ceiling is what students reach that SAM alone
teaches: one like the quickstart's, and one of SAM's own architecture. A row that is done is kept: the same command
goes on after a stop. OUTPUT gets curves.md and curves.png.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

from measured_rows import measure_row, row_paths

from transformers_radio.disk import write_text
from transformers_radio.evaluation.figure_style import BLUE, GRAY, PANEL, new_figure, save_figure, style_axes
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.quickstart.measure import Yardstick, measure
from transformers_radio.quickstart.run import STUDENTS
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import Recipe, load_recipe
from transformers_radio.training.recipe import StageRecipe, StudentRecipe

RECIPE = STUDENTS["eradio"][0]
METRICS = ("Zero-shot", "k-NN", "mIoU", "Masks")
STEPS = (250, 500, 760, 3600)  # `make quickstart` has 760, `make long` 3600
WIDTHS, WIDTH_STEPS = (12, 24, 48), 500  # of the first stage and the stem; the quickstart's is 24
SAM_STEPS, SAM_BATCH = (1400, 5600), 16
SAM_LIKE = StudentRecipe(
    size="vit-ti-16",
    config={"num_hidden_layers": 4, "mlp_ratio": 3.5, "max_img_size": 128, "num_registers": 0, "cpe_sampling": False},
    summary="cls",
    attn_implementation="eager",
)
SAM_LIKE.config["initializer_range"] = 0.05  # as in the quickstart's ViT
Row = dict[str, float | None]


def quickstart_recipe(output: Path, seed: int, overrides: list[str]) -> Recipe:
    places = [f"data.path={output}/world/train-*.tar", f"teacher_cache={output}/teachers"]
    return load_recipe(RECIPE, [*places, f"seed={seed}", *overrides])


def of_steps(output: Path, seed: int, steps: int, *overrides: str) -> Recipe:
    warmup = min(200, round(steps / 7.6, -1))  # as those two have
    length = [f"stages.main.steps={steps}", f"stages.main.warmup_steps={int(warmup)}"]
    return quickstart_recipe(output, seed, [*length, *overrides])


def of_width(output: Path, seed: int, width: int) -> Recipe:
    widths = [f"student.config.embed_dim={width}", f"student.config.stem_channels={width}"]
    return of_steps(output, seed, WIDTH_STEPS, *widths)


def from_sam_alone(output: Path, seed: int, steps: int, student: StudentRecipe | None = None) -> Recipe:
    recipe = quickstart_recipe(output, seed, [])
    recipe.student = student or recipe.student
    recipe.teachers = {"sam": recipe.teachers["sam"]}
    recipe.teachers["sam"].feature_weight = 1
    recipe.stages = {"main": StageRecipe(steps, 128, SAM_BATCH, warmup_steps=steps // 14)}
    return recipe


def best_of_teachers(output: Path, yardstick: Yardstick) -> dict[str, float]:
    """Column -> the best teacher's, measured once."""
    path = output / "teachers.json"
    if not path.exists():
        teachers = yardstick.recipe.teachers.values()
        rows = [
            measure(load_encoder(f"{spec.type}:{spec.checkpoint}", spec.image_size), yardstick) for spec in teachers
        ]
        write_text(path, json.dumps({metric: max(row[metric] or 0 for row in rows) for metric in METRICS}) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/quickstart-curves"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=["steps", "width", "ceiling"])
    options = parser.parse_args()
    output, seed = options.output, options.seed
    yardstick = Yardstick(make_world(output / "world").directory, load_recipe(RECIPE))
    best = best_of_teachers(output, yardstick)
    print(f"| the best teacher | | {cells(best)} |", flush=True)
    recipes = {
        "steps": {f"{steps} steps": of_steps(output, seed, steps) for steps in STEPS},
        "width": {f"width {width}": of_width(output, seed, width) for width in WIDTHS},
        "ceiling": {
            f"SAM alone, {name}, {steps} steps": from_sam_alone(output, seed, steps, student)
            for name, student in (("the quickstart's student", None), ("SAM's architecture", SAM_LIKE))
            for steps in SAM_STEPS
        },
    }
    rows: dict[str, dict[float, Row]] = {}
    report = [f"| | Params (M) | {' | '.join(METRICS)} |", "|---" + "|---:" * (1 + len(METRICS)) + "|"]
    report.append(f"| the best teacher | | {cells(best)} |")
    for curve in options.only or recipes:
        for name, recipe in recipes[curve].items():
            row = measure_row(recipe, output / "runs", yardstick)
            parameters = load_encoder(str(row_paths(recipe, output / "runs")[1] / "student")).params / 1e6
            report.append(f"| {name} | {parameters:.2f} | {cells(row)} |")
            print(report[-1], flush=True)
            rows.setdefault(curve, {})[recipe.stages["main"].steps if curve == "steps" else parameters] = row
            write_text(output / "curves.md", "\n".join(report) + "\n")
    draw({curve: rows[curve] for curve in ("steps", "width") if curve in rows}, best, output / "curves.png")


def cells(row: Row | dict[str, float]) -> str:
    values = [row.get(metric) for metric in METRICS]
    return " | ".join("–" if value is None else f"{value:.2f}" for value in values)


def draw(curves: dict[str, dict[float, Row]], best: dict[str, float], path: Path) -> None:
    """Each column in percent of the best teacher's, over steps and over parameters."""
    if not curves:
        return
    figure = new_figure(PANEL[0] * len(METRICS) * 0.7, PANEL[1] * len(curves) * 0.8)
    panels = figure.subplots(len(curves), len(METRICS), squeeze=False)
    for line, (curve, rows) in zip(panels, curves.items(), strict=True):
        for axes, metric in zip(line, METRICS, strict=True):
            axes.plot(list(rows), [100 * (row[metric] or 0) / best[metric] for row in rows.values()], "o-", color=BLUE)
            axes.axhline(100, color=GRAY, linewidth=1)
            axes.set_xscale("log")
            axes.set_xticks(list(rows), [f"{value:.3g}" if curve == "width" else f"{value:,}" for value in rows])
            axes.minorticks_off()
            style_axes(axes, "steps" if curve == "steps" else "million parameters", f"{metric}, %")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
