"""The linear segmentation probe with its encoder in float32 and in bf16: is it the same mIoU?

On the quickstart's made images, with its DINOv2 and CLIP as encoders and the pipeline of `eval segmentation`. Head,
loss and optimizer are float32 in both. Seconds are process time, training and test together.

    python benchmarks/probe_precision.py [OUTPUT] [--iterations 400] [--seeds 0 1 2]
"""

import argparse
import statistics
import time
from pathlib import Path

from accelerate import Accelerator

from transformers_radio.evaluation.encoder import VisionEncoder, load_encoder
from transformers_radio.evaluation.segmentation import segmentation_probe
from transformers_radio.evaluation.segmentation_config import SegmentationConfig
from transformers_radio.evaluation.segmentation_data import SegmentationData, SplitSource
from transformers_radio.quickstart.run import RECIPE
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import load_recipe


def measure(encoder: VisionEncoder, data: SegmentationData, seed: int, precision: str, options) -> tuple[float, float]:
    """mIoU in percent and seconds."""
    side = encoder.image_size
    config = SegmentationConfig(
        iterations=options.iterations,
        warmup_iterations=options.iterations // 10,
        long_side=4 * side,
        short_side=side,
        crop_size=side,
        stride=2 * side // 3,
        size_divisor=encoder.step,
        seed=seed,
        num_workers=0,
        mixed_precision=precision,
    )
    folder = options.output / f"{encoder.name}-{precision}-{seed}-{options.iterations}"
    start = time.process_time()
    report = segmentation_probe(encoder.features, encoder.name, data, config, folder)
    return report["mIoU"], time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/probe_precision"))
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    world = make_world(options.output / "world", train=2000, validation=400)
    splits = {
        split: [SplitSource(split=split, image_column="jpg", mask_column="semantic.png")]
        for split in ("train", "validation")
    }
    data = SegmentationData("made images", str(world.directory), ["background", *world.classes], splits)
    device = Accelerator(mixed_precision="no").device
    print("| encoder | precision | mIoU | seconds |\n|---|---|---:|---:|")
    for name in ("dinov2", "clip"):
        teacher = load_recipe(RECIPE).teachers[name]
        encoder = load_encoder(f"{name}={teacher.type}:{teacher.checkpoint}", None, "float32", device)
        for precision in ("no", "bf16"):
            scores, seconds = zip(
                *(measure(encoder, data, seed, precision, options) for seed in options.seeds), strict=True
            )
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            label = "float32" if precision == "no" else precision
            mean = statistics.mean(scores)
            print(f"| {name} | {label} | {mean:.2f} ± {spread:.2f} | {statistics.mean(seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
