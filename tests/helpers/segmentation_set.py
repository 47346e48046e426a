"""A small segmentation set in which the color of a pixel is its class."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from transformers_radio.evaluation.segmentation.config import SegmentationData, SplitSource

COLORS = np.array([[220, 40, 40], [40, 200, 60], [50, 70, 210]])


LITTLE = {
    **{"iterations": 40, "batch_size": 4, "learning_rate": 0.05, "warmup_iterations": 4, "checkpoint_every": 2},
    **{"short_side": 32, "long_side": 128, "crop_size": 32, "stride": 16, "size_divisor": 8, "num_workers": 0},
    "photometric_distortion": False,
}


def encode(images):
    """Mean and brightest color of patches of 8 x 8 pixels: 6 features."""
    grid = torch.cat([F.avg_pool2d(images, 8), F.max_pool2d(images, 8)], dim=1)
    return grid.flatten(2).transpose(1, 2), tuple(grid.shape[-2:])


def write_set(folder):
    """16 and 5 pictures of rectangles in noisy colors; the color is the class, and the top row does not count."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 16), ("validation", 5)):
        for number in range(count):
            height, width = rng.integers(32, 60, 2)
            mask = np.full((height, width), rng.integers(1, 4), dtype=np.uint8)
            mask[height // 3 :, : width // 2] = rng.integers(1, 4)
            noise = rng.normal(0, 20, (height, width, 3))
            image = np.clip(COLORS[mask - 1] + noise, 0, 255).astype(np.uint8)
            mask[0] = 0
            for kind, pixels in (("images", image), ("masks", mask)):
                path = folder / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return folder


def describe(folder):
    splits = {"train": "training", "validation": "validation"}
    return SegmentationData(
        name="colors",
        path=str(folder),
        classes=["red", "green", "blue"],
        reduce_labels=True,
        splits={key: [SplitSource(images=f"images/{name}", masks=f"masks/{name}")] for key, name in splits.items()},
    )
