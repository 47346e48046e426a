"""The paper's backbone study (section 5.1, Table 6) in miniature, on the quickstart's world: `make backbones`.

    python benchmarks/backbone_study.py [OUTPUT] [--steps 300] [--seeds 0 1 2] [--only NAME ...]

Students of about two million parameters learn from the quickstart's three teachers with one recipe that was tuned for
none of them: all weights 1, PHI-S, 128 pixels, 16 images per step. Two more rows learn from a larger student (the
proxy) that learned from the same teachers: alone, and beside the teachers. A row that is done is kept: the same
command resumes after a stop. OUTPUT gets backbones.md, backbones.json and backbones.png.
"""

import argparse
import json
import os
import statistics
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import torch
from matplotlib.axes import Axes
from measured_rows import mean_and_spread, measure_row, row_paths

from transformers_radio.disk import write_text
from transformers_radio.evaluation.figure_style import BLUE, GRAY, PANEL, new_figure, save_figure, style_axes
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.quickstart.measure import Yardstick
from transformers_radio.quickstart.run import VIT_RECIPE
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import Recipe, load_recipe
from transformers_radio.training.recipe import StageRecipe, StudentRecipe, TeacherRecipe

SIDE, BATCH = 128, 16
ERADIO = {"embed_dim": 24, "depths": [1, 2, 2, 2], "num_heads": [2, 4], "stem_channels": 24, "max_img_size": SIDE}
VIT = {"max_img_size": SIDE, "num_registers": 0, "cpe_sampling": False, "initializer_range": 0.05}
STUDENTS = {
    "ViT": StudentRecipe(
        size="vit-ti-16", config={**VIT, "num_hidden_layers": 4}, summary="cls", attn_implementation="eager"
    ),
    "E-RADIO": StudentRecipe(type="eradio", size="xt", config=ERADIO),
    "E-RADIO without upsampling": StudentRecipe(type="eradio", size="xt", config={**ERADIO, "neck": None}),
    "ConvNeXt": StudentRecipe(type="radio_timm", size="convnext-2m"),
    "ConvNeXt, features at stride 16": StudentRecipe(
        type="radio_timm", size="convnext-2m", config={"feature_stride": 16}
    ),
    "EfficientNetV2": StudentRecipe(type="radio_timm", size="efficientnetv2-2m"),
    "RegNetY": StudentRecipe(type="radio_timm", size="regnety-2m"),
    "ResNetV2": StudentRecipe(type="radio_timm", size="resnetv2-2m"),
    "EfficientViT": StudentRecipe(type="radio_timm", size="efficientvit-2m"),
    "SwinV2": StudentRecipe(type="radio_timm", size="swinv2-2m", config={"image_size": SIDE}),
    "FastViT": StudentRecipe(type="radio_timm", size="fastvit-2m"),
    "Hiera": StudentRecipe(type="radio_timm", size="hiera-2m", config={"image_size": SIDE}),
}
# distilled from the proxy, whose adaptors stand for the teachers (EUPE's way to a small student, arXiv 2603.22387)
PROXY = StudentRecipe(
    size="vit-s-16", config={**VIT, "num_hidden_layers": 4}, summary="cls", attn_implementation="eager"
)
FROM_PROXY = ("ViT, from the proxy", "ViT, from the proxy and the teachers")
METRICS = ("Zero-shot", "k-NN", "mIoU", "Masks")
FEATURE_LOSS = "dinov2/features"  # which the paper's table has
Results = dict[str, list[dict[str, float | None]]]


def base_recipe(world: Path, output: Path, steps: int, seed: int) -> Recipe:
    settings = [f"data.path={world}/train-*.tar", f"teacher_cache={output}/teachers", f"seed={seed}"]
    recipe = load_recipe(VIT_RECIPE, settings)
    for teacher in recipe.teachers.values():
        teacher.summary_weight = teacher.feature_weight = 1
    recipe.stages = {"main": StageRecipe(steps, SIDE, BATCH, warmup_steps=steps // 10)}
    recipe.log_every_steps = 10
    return recipe


def student_recipe(base: Recipe, name: str) -> Recipe:
    recipe = deepcopy(base)
    recipe.student = deepcopy(STUDENTS[name])
    return recipe


def proxy_recipe(world: Path, output: Path, steps: int) -> Recipe:
    """Three times the steps, and one proxy for all seeds."""
    recipe = base_recipe(world, output, 3 * steps, seed=0)
    recipe.student = deepcopy(PROXY)
    return recipe


def from_proxy_recipe(base: Recipe, name: str, proxy: Path) -> Recipe:
    recipe = student_recipe(base, "ViT")
    heads = {
        teacher: TeacherRecipe(
            type="transformers", checkpoint=str(proxy), image_size=SIDE, options={"adaptor": teacher}
        )
        for teacher in recipe.teachers
    }
    # a proxy of other steps gives other outputs, and one that stands alone has the teachers' names
    recipe.teacher_cache = f"{recipe.teacher_cache}-{name.replace(', ', '-').replace(' ', '-')}-{proxy.parent.name}"
    if name == FROM_PROXY[0]:
        recipe.teachers = heads
    else:
        recipe.teachers |= {f"proxy_{teacher}": head for teacher, head in heads.items()}
    return recipe


def images_per_second(students: dict[str, Path], rounds: int = 5) -> dict[str, float]:
    """Batches of 16 images of 128 pixels, float32, without adaptors: the median over rounds in turn.

    Seconds are those of this process's processor time over its threads, so that other programs do not count.
    """
    models: dict[str, Any] = {name: load_encoder(str(path)).model.eval() for name, path in students.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    with torch.inference_mode():
        for number in range(1 + rounds):
            for name, model in models.items():
                started = time.process_time()
                for _ in range(3):
                    model(images, adaptors=[])
                seconds = (time.process_time() - started) / torch.get_num_threads()
                if number:  # the first round warms up
                    rates[name].append(3 * BATCH / seconds)
    return {name: statistics.median(of_rounds) for name, of_rounds in rates.items()}


def run_study(output: Path, steps: int, seeds: list[int], only: list[str]) -> tuple[Results, dict[str, Path]]:
    """Row -> its metrics, one dict per seed; and the folder of each row's student of the first seed."""
    world = make_world(output / "world").directory
    yardstick = Yardstick(world, load_recipe(VIT_RECIPE))
    runs = output / "runs"
    results: Results = {}
    folders: dict[str, Path] = {}
    for seed in seeds:
        base = base_recipe(world, output, steps, seed)
        recipes = {name: student_recipe(base, name) for name in STUDENTS if name in only}
        if set(only) & set(FROM_PROXY):
            proxy = proxy_recipe(world, output, steps)
            results["ViT, the proxy"] = [measure_row(proxy, runs, yardstick)]
            folders["ViT, the proxy"] = student = row_paths(proxy, runs)[1] / "student"
            recipes |= {name: from_proxy_recipe(base, name, student) for name in FROM_PROXY if name in only}
        for name, recipe in recipes.items():
            metrics = measure_row(recipe, runs, yardstick)
            results.setdefault(name, []).append(metrics)
            folders.setdefault(name, row_paths(recipe, runs)[1] / "student")
            print(f"seed {seed}, {name}: {json.dumps(metrics)}", flush=True)
    return results, folders


def means(results: Results, metric: str) -> dict[str, float]:
    """Row -> the mean over the seeds, of the rows that have the metric."""
    known = {name: [row[metric] for row in rows if row.get(metric) is not None] for name, rows in results.items()}
    return {name: statistics.mean(values) for name, values in known.items() if values}  # type: ignore[type-var]


def correlation(results: Results, metric: str) -> float:
    """Of the students' feature loss with a metric (Pearson), over the means of the seeds.

    Rows with other teachers or another size are left out.
    """
    losses, values = means(results, FEATURE_LOSS), means(results, metric)
    names = [name for name in STUDENTS if name in losses]
    return statistics.correlation([losses[name] for name in names], [values[name] for name in names])


def markdown(results: Results, parameters: dict[str, float], rates: dict[str, float]) -> str:
    columns = ("Parameters, M", "Images/s", *METRICS, "Feature loss")
    lines = ["| Student | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for name, rows in results.items():
        cells = [f"{parameters[name]:.2f}", f"{rates[name]:.0f}"]
        cells += [mean_and_spread([row[metric] for row in rows]) for metric in METRICS]
        cells.append(mean_and_spread([row.get(FEATURE_LOSS) for row in rows], digits=3))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if len([name for name in STUDENTS if name in results]) > 2:
        known = [metric for metric in METRICS if means(results, metric)]
        found = ", ".join(f"{metric} {correlation(results, metric):.2f}" for metric in known)
        lines.append(f"\nCorrelation of the feature loss with {found}.")
    return "\n".join(lines) + "\n"


def front(x: dict[str, float], y: dict[str, float]) -> list[str]:
    """The students that no other one beats in both."""
    names = [name for name in STUDENTS if name in x]
    return [name for name in names if not any(x[other] > x[name] and y[other] > y[name] for other in names)]


def draw_points(axes: Axes, x: dict[str, float], y: dict[str, float], with_front: bool) -> None:
    """A point per student with its name; those on the front are joined and blue."""
    best = front(x, y) if with_front else []
    for name in (name for name in STUDENTS if name in x):
        axes.plot(x[name], y[name], "o", color=BLUE if name in best else GRAY, markersize=4)
        # names stand toward the middle; of points as near as E-RADIO's two, the one with the shorter name below
        is_right = sum(other < x[name] for other in x.values()) > len(x) / 2
        offset = (-3 if is_right else 3, -8 if name == "E-RADIO" else 3)
        side = "right" if is_right else "left"
        axes.annotate(name, (x[name], y[name]), offset, textcoords="offset points", size=5.5, ha=side)
    if best:
        line = sorted((x[name], y[name]) for name in best)
        axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=0.8)


def draw(results: Results, rates: dict[str, float], path: Path) -> None:
    figure = new_figure(3 * PANEL[0], PANEL[1])
    panels = figure.subplots(1, 3)
    for axes, metric in zip(panels, ("k-NN", "mIoU"), strict=False):
        draw_points(axes, rates, means(results, metric), with_front=True)
        axes.set_xscale("log")
        style_axes(axes, "images/s", f"{metric}, %")
    draw_points(panels[2], means(results, FEATURE_LOSS), means(results, "mIoU"), with_front=False)
    style_axes(panels[2], "feature loss (DINOv2)", "mIoU, %")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*STUDENTS, *FROM_PROXY]
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/backbones"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME")
    options = parser.parse_args()
    results, folders = run_study(options.output, options.steps, options.seeds, options.only)
    parameters = {name: load_encoder(str(path)).params / 1e6 for name, path in folders.items()}
    rates = images_per_second(folders)
    report = markdown(results, parameters, rates)
    write_text(options.output / "backbones.md", report)
    write_text(options.output / "backbones.json", json.dumps({"rows": results, "rates": rates}, indent=1) + "\n")
    if any(name in STUDENTS for name in results):
        draw(results, rates, options.output / "backbones.png")
    print(report)


if __name__ == "__main__":
    main()
