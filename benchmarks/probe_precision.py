"""Linear segmentation probes on an encoder in float32 and in bf16: is it the same mIoU?

On the quickstart's made images, with its DINOv2 and CLIP as encoders and its own short probe; head, loss and optimizer
are float32 throughout. bf16 is measured both ways that `probe.mixed_precision=bf16` has: autocast around float32
weights, as for students, and bfloat16 weights, as for teachers. The features' distance to those of float32 is beside
each mIoU: a distance of 0 would mean that nothing was computed in bf16, and is an error.

    python benchmarks/probe_precision.py [OUTPUT] [--seeds 0 1 2]
"""

import argparse
import statistics
from pathlib import Path

import torch

from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.segmentation.quick_probe import probe_miou
from transformers_radio.quickstart.measure import PROBE_IMAGES, SCORED_IMAGES, resize_images
from transformers_radio.quickstart.run import VIT_RECIPE
from transformers_radio.quickstart.teacher_data import load_split
from transformers_radio.quickstart.world import make_world
from transformers_radio.teachers import Teacher
from transformers_radio.training import load_recipe

WAYS = {"float32": ("float32", False), "bf16, autocast": ("float32", True), "bf16, weights": ("bfloat16", False)}


@torch.no_grad()
def encode(teacher: Teacher, autocast: bool, images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) -> maps (N, C, h, w). As `Teacher.forward`, which lets no autocast in."""
    maps = []
    for batch in resize_images(images, teacher.image_size).split(64):
        pixel_values = ((batch.float() / 255 - teacher.mean.float()) / teacher.std.float()).to(teacher.dtype)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            output = teacher.encode(pixel_values)
        maps.append(output.features.float().transpose(1, 2).unflatten(2, output.grid))  # (B, h*w, C) -> (B, C, h, w)
    return torch.cat(maps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/probe_precision"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    world = make_world(options.output / "world", train=PROBE_IMAGES, validation=SCORED_IMAGES)
    train = load_split(world.directory, "train", PROBE_IMAGES)
    validation = load_split(world.directory, "validation", SCORED_IMAGES)
    recipe = load_recipe(VIT_RECIPE)
    print(
        "| encoder | precision | distance of the features | mIoU | minus float32, by seed |\n|---|---|---:|---:|---:|"
    )
    for name in ("dinov2", "clip"):
        spec = f"{recipe.teachers[name].type}:{recipe.teachers[name].checkpoint}"
        exact, full = torch.empty(0), []
        for way, (dtype, autocast) in WAYS.items():
            teacher = load_encoder(spec, None, dtype).model
            features = encode(teacher, autocast, validation.images)
            exact = features if way == "float32" else exact
            distance = ((features - exact).norm() / exact.norm()).item()
            if way != "float32" and distance == 0:
                raise RuntimeError(f"{name}, {way}: the features are those of float32, so this compares nothing.")
            sets = (encode(teacher, autocast, train.images), train.semantic), (features, validation.semantic)
            scores = [probe_miou(*sets, 1 + len(world.classes), seed=seed) for seed in options.seeds]
            full = scores if way == "float32" else full
            differences = ", ".join(f"{one - other:+.2f}" for one, other in zip(scores, full, strict=True))
            mean = statistics.mean(scores)
            print(f"| {name} | {way} | {100 * distance:.2f} % | {mean:.2f} | {differences} |", flush=True)


if __name__ == "__main__":
    main()
