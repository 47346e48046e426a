"""Linear segmentation probes on an encoder in float32 and in bf16: is it the same mIoU?

On the quickstart's made images, with its DINOv2 and CLIP as encoders and its own short probe. The encoder runs under
autocast, as with `probe.mixed_precision=bf16`; head, loss and optimizer are float32 in both.

    python benchmarks/probe_precision.py [OUTPUT] [--seeds 0 1 2]
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch

from transformers_radio.evaluation.encoder import Features, VisionEncoder, load_encoder
from transformers_radio.evaluation.segmentation_light import probe_miou
from transformers_radio.quickstart.measure import PROBE_IMAGES, SCORED_IMAGES, resize_images
from transformers_radio.quickstart.run import RECIPE
from transformers_radio.quickstart.teacher_data import load_split
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import load_recipe


def encode(encoder: VisionEncoder, bf16: bool, images: torch.Tensor) -> Features:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        features, grid = encoder.features(resize_images(images, encoder.image_size).clamp(0, 1))
    return features.float(), grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/probe_precision"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    world = make_world(options.output / "world", train=PROBE_IMAGES, validation=SCORED_IMAGES)
    train = load_split(world.directory, "train", PROBE_IMAGES)
    validation = load_split(world.directory, "validation", SCORED_IMAGES)
    teachers = load_recipe(RECIPE).teachers
    print("| encoder | float32 | bf16 | difference, seed by seed |\n|---|---:|---:|---:|")
    for name in ("dinov2", "clip"):
        encoder = load_encoder(f"{name}={teachers[name].type}:{teachers[name].checkpoint}")
        scores = {
            bf16: [
                probe_miou(
                    partial(encode, encoder, bf16),
                    *(train.images, train.semantic, validation.images, validation.semantic),
                    num_classes=1 + len(world.classes),
                    seed=seed,
                )
                for seed in options.seeds
            ]
            for bf16 in (False, True)
        }
        means = [f"{statistics.mean(values):.2f}" for values in scores.values()]
        differences = [f"{half - full:+.2f}" for full, half in zip(*scores.values(), strict=True)]
        print(f"| {name} | {' | '.join(means)} | {', '.join(differences)} |", flush=True)


if __name__ == "__main__":
    main()
