"""What the trainers of the three small teachers share: the world in memory, crops, schedules, position tables."""

import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from .scenes import draw_scene
from .world import read_split

# Per channel, of pixels in [0, 1]: ImageNet's. A sam.pth does not state its own; loaders take these for granted.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Split:
    """One split of the made world, decoded.

    Attributes:
        images: (N, 3, 128, 128) uint8.
        captions: N sentences.
        classes: (N,) int64, 0 to 95.
        semantic: (N, 128, 128) uint8, 0 background, else 1 + shape * 8 + material.
        instances: (N, 128, 128) uint8, 0 background, else 1 + position in the scene's boxes.
        boxes: for each scene (n_objects, 4) int64, x0 y0 x1 y1 in pixels; the main object first.
    """

    images: torch.Tensor
    captions: list[str]
    classes: torch.Tensor
    semantic: torch.Tensor
    instances: torch.Tensor
    boxes: list[torch.Tensor]


def load_split(directory: Path, split: str, limit: int | None = None) -> Split:
    """Read a split of the made world, or its first `limit` scenes, into memory (about 80 kB a scene)."""
    samples = list(islice(read_split(directory, split), limit))
    return Split(
        torch.from_numpy(np.stack([np.asarray(s["jpg"]) for s in samples])).permute(0, 3, 1, 2).contiguous(),
        [s["txt"] for s in samples],
        torch.tensor([s["cls"] for s in samples]),
        torch.from_numpy(np.stack([np.asarray(s["semantic.png"]) for s in samples])),
        torch.from_numpy(np.stack([np.asarray(s["instances.png"]) for s in samples])),
        [torch.tensor([o["box"] for o in s["json"]["objects"]]) for s in samples],
    )


def _draw_frame(scene: tuple[int, int, int]) -> np.ndarray:
    seed, index, frame = scene
    return draw_scene("train", seed, index, frame).image


def draw_frames(seed: int, count: int, frames: int, workers: int = 2) -> torch.Tensor:
    """Further pictures of the first `count` training scenes' main objects: (frames, count, 3, 128, 128) uint8."""
    scenes = [(seed, index, frame) for frame in range(1, frames + 1) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        drawn = list(
            tqdm(pool.imap(_draw_frame, scenes, chunksize=100), "drawing frames", total=len(scenes), unit="frame")
        )
    # (frames * count, 128, 128, 3) -> (frames, count, 3, 128, 128)
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).unflatten(0, (frames, count)).contiguous()


def normalize(images: torch.Tensor, side: int) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, side, side) float32, standardized per channel."""
    if images.shape[-1] != side:
        images = transforms.resize(images, [side, side], antialias=True)
    return transforms.normalize(images.float() / 255, list(MEAN), list(STD))


def random_crops(
    images: torch.Tensor, side: int, scale: tuple[float, float], rng: np.random.Generator, flip: bool = False
) -> torch.Tensor:
    """Cut one random square out of each image.

    Args:
        images: (B, 3, H, H) uint8.
        side: pixels of the result.
        scale: smallest and largest share of the image's area, each in (0, 1].
        flip: mirror half of the crops.

    Returns:
        (B, 3, side, side) uint8.
    """
    crops = []
    for image in images:
        cut = round(image.shape[-1] * math.sqrt(rng.uniform(*scale)))
        top, left = (int(v) for v in rng.integers(0, image.shape[-1] - cut + 1, 2))
        crop = transforms.resized_crop(image, top, left, cut, cut, [side, side], antialias=True)
        crops.append(crop.flip(-1) if flip and rng.random() < 0.5 else crop)
    return torch.stack(crops)


def jitter(images: torch.Tensor, rng: np.random.Generator, strength: float = 0.2) -> torch.Tensor:
    """Scale and shift each image's channels at random: (B, 3, h, w) float -> the same."""
    gain, shift = rng.uniform(-strength, strength, (2, len(images), 3, 1, 1)).astype(np.float32)
    return images * torch.from_numpy(1 + gain) + torch.from_numpy(shift)


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Shuffled positions without end, each once an epoch; the last batch of an epoch is left out when it is short."""
    while True:
        order = torch.from_numpy(rng.permutation(count))
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a half cosine to 1 % of the peak. Returns the rate that was set."""
    warmup = max(1, steps // 20)
    decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    rate = peak * min(1.0, (step + 1) / warmup) * decay
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def parameter_groups(modules: list[torch.nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices; leave biases, norms and single vectors alone."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """A sine-cosine table to start the learned positions from: a short training does not find one by itself.

    Args:
        grid: patches along a side.
        width: channels, a multiple of 4; half for the row and half for the column.

    Returns:
        (grid * grid, width) float32, row-major, of root mean square 0.35.
    """
    frequency = 1.5 / 100 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(grid)[:, None] * frequency  # (grid, width / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, width / 2)
    rows, columns = axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)
    return 0.5 * torch.cat([rows, columns], dim=-1).reshape(grid * grid, width)


def vision_parameters(module: torch.nn.Module) -> int:
    """The number of weights of a module."""
    return sum(p.numel() for p in module.parameters())
