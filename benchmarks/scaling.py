"""Whether the cost model of `transformers-radio plan` predicts the time of a step: `python benchmarks/scaling.py`.

Small students learn from random teachers of real architectures, on one CPU thread. The first configuration says how
many FLOP/s this machine reaches and how long an image takes to be read; the others are predicted from their FLOPs.
Rounds go through all configurations, and the fastest step of each counts. Under two minutes on an idle core.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import torch  # noqa: E402
from input_pipeline import make_photos
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from transformers_radio.data import ImageStream
from transformers_radio.training import load_recipe, train
from transformers_radio.training.groups import stage_groups
from transformers_radio.training.plan.cost import GPU, stage_loads, stage_time
from transformers_radio.training.plan.count import make_plan
from transformers_radio.training.recipe import Recipe

ROUNDS = 2
STEPS = 3
UNTIMED = 1  # the first step of a run warms the allocator

RECIPE = """
output_dir: {folder}/run
overwrite: true
student: {{size: vit-ti-16, config: {{max_img_size: 448, num_registers: 4}}}}
teachers:
  {teachers}
data: {{path: {folder}/photos, num_workers: 0}}
stages:
  main: {{steps: {steps}, resolution: 224, batch_size: 2}}
checkpoints: {{every_steps: 1000, keep: 1}}
log_every_steps: 1
tracker: null
"""
TEACHERS = {
    "dinov2": "dinov2: {{type: transformers, checkpoint: {folder}/dinov2}}",
    "clip": "clip: {{type: transformers, checkpoint: {folder}/clip}}",
    "large": "large: {{type: transformers, checkpoint: {folder}/dinov2, image_size: 448}}",
}
GROUPS = (
    "stages.main={resolution: 0, groups: {low: {teachers: [dinov2, clip], resolution: 224, batch_size: 2}, "
    "high: {teachers: [large], resolution: 448, batch_size: 1}}}"
)
CONFIGURATIONS = {  # name -> teachers, overrides; the first calibrates
    "ViT-Ti/16 at 224, one teacher": (["dinov2"], []),
    "ViT-S/16 at 224, one teacher": (["dinov2"], ["student.size=vit-s-16"]),
    "ViT-Ti/16 at 224, two teachers": (["dinov2", "clip"], []),
    "ViT-Ti/16 at 448, one teacher": (["dinov2"], ["stages.main.resolution=448"]),
    "the same with gradient checkpointing": (
        ["dinov2"],
        ["stages.main.resolution=448", "student.gradient_checkpointing=true"],
    ),
    "ViT-S/16, two groups: 2 images at 224, 1 at 448": (
        ["dinov2", "clip", "large"],
        ["student.size=vit-s-16", GROUPS],
    ),
}


def make_recipe(folder: Path, teachers: list[str], overrides: list[str]) -> Recipe:
    lines = "\n  ".join(TEACHERS[name].format(folder=folder) for name in teachers)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(folder=folder, steps=STEPS, teachers=lines))
    return load_recipe(path, overrides)


def make_teachers(folder: Path) -> None:
    """DINOv2 ViT-S/14, and a CLIP of about its cost, with random weights."""
    processor = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    dinov2 = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224)
    clip = CLIPVisionConfig(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, patch_size=16)
    for name, model in (("dinov2", Dinov2Model(dinov2)), ("clip", CLIPVisionModelWithProjection(clip))):
        model.save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))


def predicted_flops(recipe: Recipe) -> float:
    """FLOPs per step as `plan` counts them: the seconds of a machine that does one FLOP per second."""
    loads = stage_loads(make_plan(recipe, processes=1, device=torch.device("cpu")), "main")
    return stage_time(loads, STEPS, GPU(half_tflops=1e-12, float32_tflops=1e-12, memory_gb=1), 1.0).seconds


def measured_seconds(recipe: Recipe) -> tuple[float, int]:
    """(seconds of the fastest step of `train`, its images), from its own log."""
    train(recipe)
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
    images = sum(group.batch_size for group in stage_groups("main", recipe.stages["main"], list(recipe.teachers)))
    return min(images / line["images_per_second"] for line in lines[UNTIMED:]), images


def seconds_to_read_an_image(recipe: Recipe) -> float:
    """Median of one at a time, at 224 pixels: so small a part of a step that larger sides count the same."""
    stream = ImageStream(recipe.data, resolutions=[224], batch_size=1, seed=0)
    batches, seconds = iter(stream), []
    for _ in range(40):
        started = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - started)
    stream.close()
    return statistics.median(seconds)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        make_photos(folder / "photos")
        make_teachers(folder)
        recipes = {key: make_recipe(folder, *configuration) for key, configuration in CONFIGURATIONS.items()}
        flops = {key: predicted_flops(recipe) for key, recipe in recipes.items()}
        first = next(iter(recipes))
        reading = seconds_to_read_an_image(recipes[first])
        fastest = dict.fromkeys(recipes, float("inf"))  # what other programs take only adds to the time
        images = {}
        for number in range(ROUNDS):
            for key, recipe in recipes.items():
                seconds, images[key] = measured_seconds(recipe)
                fastest[key] = min(fastest[key], seconds)
            print(f"round {number + 1} of {ROUNDS}", flush=True)
        flop_rate = flops[first] / (fastest[first] - images[first] * reading)
        print(f"{flop_rate / 1e9:.0f} GFLOP/s, {reading * 1e3:.1f} ms to read an image\n")
        print("| configuration | GFLOPs a step | measured s | predicted s | predicted / measured |")
        print("|---|---|---|---|---|")
        for key, seconds in fastest.items():
            predicted = flops[key] / flop_rate + images[key] * reading
            ratio = "(calibrates)" if key == first else f"{predicted / seconds:.2f}"
            print(f"| {key} | {flops[key] / 1e9:.0f} | {seconds:.2f} | {predicted:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
