"""What the trainers of the three small teachers share: the scenes in memory, crops, the optimizer, position tables."""

import math
import multiprocessing
from collections.abc import Callable, Iterator
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
    """One split of the synthetic scenes, decoded.

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
    """Reads a split, or its first `limit` scenes, into memory (about 80 kB per scene)."""
    samples = list(islice(read_split(directory, split), limit))
    return Split(
        torch.stack([transforms.pil_to_tensor(s["jpg"]) for s in samples]).contiguous(),
        [s["txt"] for s in samples],
        torch.tensor([s["cls"] for s in samples]),
        torch.cat([transforms.pil_to_tensor(s["semantic.png"]) for s in samples]),  # gray: (1, 128, 128) each
        torch.cat([transforms.pil_to_tensor(s["instances.png"]) for s in samples]),
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
    """Cuts one random square out of each image.

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
    """Scales and shifts each image's channels at random: (B, 3, h, w) float -> the same shape."""
    gain, shift = rng.uniform(-strength, strength, (2, len(images), 3, 1, 1)).astype(np.float32)
    return images * torch.from_numpy(1 + gain) + torch.from_numpy(shift)


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Yields shuffled positions without end, each once per epoch; a short last batch of an epoch is left out."""
    while True:
        order = torch.from_numpy(rng.permutation(count))
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def train_steps(
    name: str, module: torch.nn.Module, steps: int, peak: float, max_norm: float = 1.0
) -> Iterator[tuple[int, Callable[[torch.Tensor], None]]]:
    """Yields every step with the function that takes its loss and updates the module: AdamW, clipped gradients.

    Args:
        name: what is trained, for the progress bar.
        peak: largest learning rate, see `set_learning_rate`.
        max_norm: that gradients are clipped to.
    """
    optimizer = torch.optim.AdamW(parameter_groups([module], 0.05), lr=peak, betas=(0.9, 0.98))
    progress = tqdm(range(steps), desc=f"training {name}", unit="step")

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    for step in progress:
        set_learning_rate(optimizer, step, steps, peak)
        yield step, update


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a half cosine to 1 % of the peak. Returns the new rate."""
    warmup = max(1, steps // 20)
    decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
    rate = peak * min(1.0, (step + 1) / warmup) * decay
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def parameter_groups(modules: list[torch.nn.Module], weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices; none for biases, norms and single vectors."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def sincos_positions(grid: int, width: int) -> torch.Tensor:
    """A sine-cosine table that learned positions start from: a short training does not find one by itself.

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
