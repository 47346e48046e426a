"""A run's folder as training leaves it at some moment, without training."""

import json

import torch
from PIL import Image

from .small_students import small_student
from .tiny_sam import picture

RECIPE = """
output_dir: {run}
teachers:
  clip: {{type: open_clip, checkpoint: a}}
  dinov2: {{type: transformers, checkpoint: b}}
data: {{path: {images}}}
stages:
  low: {{steps: 100, resolution: 64, batch_size: 8}}
  high:
    steps: 20
    groups:
      one: {{teachers: [clip], resolution: 64, batch_size: 6}}
      two: {{teachers: [dinov2], resolution: 128, batch_size: 4, rate: 0.5}}
"""


def line(step, stage="low", **more):
    values = {"step": step, "stage": stage, "loss": 2.0, "clip/summary": 1 / step, "dinov2/features": 0.5, "lr": 1e-3}
    return {**values, "images_per_second": 40.0, "data_wait": 0.1, "skipped": 3, **more}


def make_run(folder):
    """A run's folder with its recipe; its images are beside it."""
    images = folder / "images"
    images.mkdir()
    for number in range(3):
        Image.fromarray(picture((70, 90), number)).save(images / f"{number}.png")
    run = folder / "run"
    run.mkdir()
    (run / "run.yaml").write_text(RECIPE.format(run=run, images=images))
    return run


def write(run, *lines, tail=""):
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + tail)


def save_checkpoint(run, step, skipped=None):
    folder = run / "checkpoints" / f"step-{step:08d}"
    torch.manual_seed(step)
    small_student("radio").save_pretrained(folder)
    (folder / "training_state").mkdir()
    streams = {"all": {"lanes": {"0": {"skipped": skipped or {}}, "1": {"skipped": {"truncated": 1}}}}}
    (folder / "training_state" / "state.json").write_text(json.dumps({"step": step, "streams": streams}))
    return folder
