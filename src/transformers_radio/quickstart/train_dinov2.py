"""The small DINOv2 of the quickstart: self-distillation with no labels and no captions.

The losses are DINOv2's (arXiv 2304.07193, section 4): the class token's across views, the masked patches' within a
view (iBOT), targets balanced by Sinkhorn-Knopp, and KoLeo, which spreads the class tokens. The teacher is a moving
average of the student. As there, the resolution rises near the end.

The two views of a scene show its main object twice, as a camera does that sees the same thing elsewhere. Two crops of
one picture have the background in common, and are told apart by it long before by any shape. Small local views, which
DINOv2 adds, cost more here than they gained.
"""

import copy
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from .teacher_data import (
    MEAN,
    STD,
    Split,
    batches,
    draw_frames,
    jitter,
    normalize,
    random_crops,
    sincos_positions,
    train_steps,
)

SIDE, EARLY_SIDE, PATCH = 84, 56, 14  # pixels: 36 patches, and 16 for the first EARLY_SHARE of the steps
EARLY_SHARE = 0.8
REGISTERS = 4
PROTOTYPES = 256
SCALE = (0.6, 1.0)  # share of the picture's area in a view
FRAMES = 2  # further pictures of each main object
TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 0.03, 0.1
BATCH = 128  # scenes per step


class _Head(nn.Module):
    """Projects tokens onto prototypes: (..., width) -> (..., PROTOTYPES) scores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 512), nn.GELU(), nn.Linear(512, 128))
        self.prototypes = nn.Linear(128, PROTOTYPES, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        directions = F.normalize(self.prototypes.weight, dim=1)
        return F.normalize(self.mlp(tokens), dim=-1) @ directions.T


@torch.no_grad()
def _balanced(scores: torch.Tensor) -> torch.Tensor:
    """Sinkhorn-Knopp: (N, PROTOTYPES) scores -> assignments that sum to 1 in each row and use all prototypes alike."""
    assignment = torch.exp((scores - scores.max()) / TEACHER_TEMPERATURE)
    for _ in range(3):
        assignment = assignment / assignment.sum(dim=0, keepdim=True).clamp(min=1e-12)
        assignment = assignment / assignment.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return assignment


def _cross_entropy(targets: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return -(targets * F.log_softmax(scores / STUDENT_TEMPERATURE, dim=-1)).sum(dim=-1).mean()


def _koleo(tokens: torch.Tensor) -> torch.Tensor:
    """Minus the mean log distance to the nearest neighbor, over (B, width) class tokens."""
    directions = F.normalize(tokens, dim=1)
    nearest = (directions @ directions.T - 2 * torch.eye(len(directions))).argmax(dim=1)
    return -torch.log((directions - directions[nearest]).norm(dim=1) + 1e-6).mean()


def _masks(count: int, grid: int, rng: np.random.Generator) -> torch.Tensor:
    """Which patches the student does not see: a random block in half of the views; bool (count, grid**2)."""
    masks = np.zeros((count, grid, grid), bool)
    for mask in masks[::2]:
        height, width = rng.integers(grid // 3, grid, 2)
        top, left = rng.integers(0, grid - height + 1), rng.integers(0, grid - width + 1)
        mask[top : top + height, left : left + width] = True
    return torch.from_numpy(masks.reshape(count, grid * grid))


class _SelfDistillation(nn.Module):
    """A student and its moving average, the teacher; each has a head for the class token and one for patches."""

    def __init__(self, config: Dinov2WithRegistersConfig) -> None:
        super().__init__()
        model = Dinov2WithRegistersModel(config)
        with torch.no_grad():
            model.embeddings.position_embeddings[:, 1:] = sincos_positions(SIDE // PATCH, config.hidden_size)
            model.embeddings.mask_token.normal_(std=0.02)
            model.embeddings.register_tokens.normal_(std=0.02)
        heads = {"image": _Head(config.hidden_size), "patch": _Head(config.hidden_size)}
        self.student = nn.ModuleDict({"model": model, **heads})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, views: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The loss of views (2 B, 3, side, side), all first ones before all second ones, and masks (2 B, patches)."""
        student, teacher = self.student, self.teacher
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                seen = teacher["model"](views).last_hidden_state.float()
            guess = student["model"](views, bool_masked_pos=masks).last_hidden_state.float()
        # in float32: cosines differ by less than bfloat16 resolves, and the temperatures magnify the difference
        with torch.no_grad():
            first, second = _balanced(teacher["image"](seen[:, 0])).chunk(2)  # (B, K) each
            patch_targets = _balanced(teacher["patch"](seen[:, 1 + REGISTERS :][masks]))  # (M, K)
        across = _cross_entropy(torch.cat([second, first]), student["image"](guess[:, 0]))
        patches = _cross_entropy(patch_targets, student["patch"](guess[:, 1 + REGISTERS :][masks]))
        spread = torch.stack([_koleo(view) for view in guess[:, 0].chunk(2)]).mean()
        return across + patches + 0.1 * spread

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)


def train_dinov2(directory: Path, data: Split, steps: int = 3000, seed: int = 0) -> dict[str, Any]:
    """Trains on images alone and writes config.json and model.safetensors with save_pretrained.

    Returns:
        What was done: steps, images seen, seconds, the last loss.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = Dinov2WithRegistersConfig(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        num_register_tokens=REGISTERS,
        layerscale_value=1.0,
    )
    distillation = _SelfDistillation(config)
    # The seed of the scenes is 0, whatever that of the training is.
    frames = torch.cat([data.images[None], draw_frames(0, len(data.images), FRAMES)])  # (1 + FRAMES, N, 3, 128, 128)
    order = batches(len(data.images), BATCH, rng)
    started = time.monotonic()
    for step, update in train_steps("dinov2", distillation.student, steps, peak=1e-3, max_norm=3.0):
        side = EARLY_SIDE if step < EARLY_SHARE * steps else SIDE
        scenes = next(order)
        pictures = torch.from_numpy(rng.integers(0, len(frames), (2, len(scenes))))
        views = torch.cat([random_crops(frames[one, scenes], side, SCALE, rng, flip=True) for one in pictures])
        views = jitter(normalize(views, side), rng)  # (2 B, 3, side, side): first all first views
        loss = distillation(views, _masks(len(views), side // PATCH, rng))
        update(loss)
        distillation.update_teacher(momentum=1 - 0.01 * (1 + math.cos(math.pi * step / steps)) / 2)  # 0.99 to 1
    teacher: Any = distillation.teacher.to(torch.float16)["model"]
    teacher.save_pretrained(directory)
    # Half the bytes on disk; loaded as float32, since bfloat16 and float32 are what CPUs are good at.
    config.dtype = torch.float32
    config.architectures = ["Dinov2WithRegistersModel"]
    config.save_pretrained(directory)
    BitImageProcessor(  # what DINOv2's releases carry: code that loads the folder reads the normalization from it
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=MEAN, image_std=STD
    ).save_pretrained(directory)
    seconds = round(time.monotonic() - started)
    return {"steps": steps, "images_seen": steps * BATCH, "seconds": seconds, "loss": round(loss.item(), 4)}
