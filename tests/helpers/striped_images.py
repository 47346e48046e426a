"""Small sets of striped images on disk, for the examples: stripes in four directions, and striped regions."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_radio import RadioConfig, RadioImageProcessor, RadioModel

SIDE = 32
NAMES = ["horizontal", "vertical", "falling", "rising"]
ADAPTORS = {"clip": {"summary_dim": 8, "feature_dim": 8, "hidden_dim": 16}}


def stripes(direction: int, rng) -> np.ndarray:
    """(32, 32, 3) uint8: stripes 8 pixels wide at a random offset, in noise."""
    y, x = np.mgrid[:SIDE, :SIDE]
    along = (y, x, x + y, x - y)[direction] + rng.integers(8)
    image = 90 + 80 * (along // 4 % 2)[..., None] + rng.normal(0, 25, (SIDE, SIDE, 3))
    return image.clip(0, 255).astype(np.uint8)


def write_classes(folder: Path) -> Path:
    """train and test, a folder per class: 64 and 16 images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 16)):
        for direction, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                Image.fromarray(stripes(direction, rng)).save(folder / split / name / f"{index}.png")
    return folder


def write_regions(folder: Path) -> Path:
    """Images of 64 x 64 pixels: a background of noise, one region of each direction; masks 0, 1, 2."""
    rng = np.random.default_rng(1)
    for split, count in (("train", 64), ("test", 16)):
        (folder / split).mkdir(parents=True)
        lines = []
        for index in range(count):
            image = rng.normal(130, 25, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            for direction, place in zip((0, 1), rng.permutation(4)[:2], strict=True):
                top, left = 32 * (place // 2), 32 * (place % 2)
                image[top : top + 32, left : left + 32] = stripes(direction, rng)
                mask[top : top + 32, left : left + 32] = direction + 1
            Image.fromarray(image).save(folder / split / f"{index}.png")
            Image.fromarray(mask).save(folder / split / f"{index}_mask.png")
            lines.append(json.dumps({"image_file_name": f"{index}.png", "mask_file_name": f"{index}_mask.png"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def save_student(folder: Path) -> Path:
    """An untrained student of two blocks with an adaptor, and its processor."""
    import torch

    torch.manual_seed(0)
    fields = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, patch_size=8, max_img_size=64)
    RadioModel(RadioConfig(adaptors=ADAPTORS, **fields)).save_pretrained(folder)
    RadioImageProcessor(size={"height": SIDE, "width": SIDE}, size_divisor=8).save_pretrained(folder)
    return folder
