"""Nonsense as an argument of a call of a student, its heads, backbone and vision tower."""

import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from damage import choose
from isolation import SOUND, Case, OtherBits
from torch import tensor, zeros

from transformers_radio import (
    RadioBackbone,
    RadioForImageClassification,
    RadioForSemanticSegmentation,
    RadioVisionTower,
)

sys.path.append(str(Path(__file__).parents[1]))
from helpers.tiny_radio import build  # noqa: E402

ANYTHING = (
    "x", "", 7, 0, -1, 1.5, math.nan, True, [], {}, (), [1], ["x"], [None], {"a": 1}, object(), b"x", 10**30,
    np.zeros(3), np.zeros(()), tensor(1), tensor(math.nan), tensor([]), zeros(2, 2), zeros(2, 0),
    zeros(2, 2, dtype=torch.complex64), zeros(2, device="meta"), zeros(2, 3, 32, 48, device="meta"),
    torch.eye(3).to_sparse(), tensor([2**62, 2**62]), tensor([[2**62, 4]]), [tensor(1), tensor(1)],
)  # fmt: skip
SHAPES = (
    (0, 3, 32, 48), (2, 3, 0, 48), (2, 3, 33, 48), (2, 1, 32, 48), (2, 4, 32, 48), (3, 32, 48), (2, 3, 1, 32, 48),
    (0,), (32, 48, 3), (2, 32, 48, 3), (2, 3, 8, 8),
)  # fmt: skip
DTYPES = (torch.uint8, torch.int64, torch.bool, torch.complex64)
NONSENSE = {
    "pixel_values": [
        *(zeros(shape) for shape in SHAPES), *(zeros(2, 3, 32, 48, dtype=kind) for kind in DTYPES), None,
        zeros(2, 3, 32, 48).tolist(), np.zeros((2, 3, 32, 48), dtype=np.float32), zeros(2, 3, 32, 48).to_sparse(),
    ],
    "adaptors": [
        "clip", ["nobody"], [1], 1, True, {"clip"}, ["clip", None], [["clip"]], tensor(0), [""], b"clip", "clip,sam",
    ],
    "window_size": [
        -1, 3, 1.5, "2", True, False, math.nan, math.inf, 10**9, -(10**30), [2], (1, 1), tensor(1.5), tensor([1, 2]),
    ],
    "image_grid_hw": [
        [[2, 3], [2, 3]], tensor([[2.0, 3.0]]), tensor([[2, 3]]), tensor([[-2, -3]]), tensor([[0, 6]]),
        tensor([[2**62, 4]]), tensor([2, 3]), tensor([[[2, 3]]]), zeros(0, 2, dtype=torch.long), tensor([[2, 3, 1]]),
        tensor([[True, True]]), tensor(6),
    ],
    "pixel_mask": [
        zeros(2, 32, 48), zeros(2, 32, 47) + 1, zeros(1, 32, 48) + 1, zeros(32, 48) + 1, zeros(2, 1, 32, 48) + 1,
        zeros(2, 32, 48) * math.nan, zeros(2, 32, 48) - 1, zeros(2, 32, 48) + 2, zeros(2, 32, 48).tolist(),
        (torch.arange(3072) % 2).view(2, 32, 48), zeros(2, 2, 3) + 1,
    ],
    "image_sizes": [
        [[32, 48]], tensor([[32, 48]]), tensor([[0, 0], [16, 16]]), tensor([[-16, 16], [16, 16]]),
        tensor([[64, 48], [32, 48]]), tensor([[31, 48], [32, 48]]), tensor([[32.0, math.nan], [32, 48]]),
        tensor([[2**62, 48], [32, 48]]), tensor([32, 48]),
    ],
    "labels": [
        tensor([0]), tensor([0, 1, 2]), tensor([0, 5]), tensor([0, -1]), tensor([0.5, 1.0]), tensor([[0, 1], [1, 0]]),
        tensor([0, 2**62]), tensor([math.nan, 0]), zeros(2, 5, dtype=torch.long), zeros(2, 4), zeros(2, 5) * math.nan,
        tensor([True, False]), ["cat", "dog"], zeros(2, 32, 48), zeros(1, 32, 48).long(), zeros(2, 32, 48).long() + 7,
        zeros(2, 0, 0).long(), zeros(2, 1, 32, 48).long(), zeros(2, 32, 48).bool(), zeros(2, 32, 48).tolist(),
        np.zeros((2, 32, 48), dtype=int), zeros(2, 32, 48).long() - 1,
    ],
}  # fmt: skip
NAMES = {"image_grid_hw": ("image_grid_hw", "grids")}
FLAGS = {  # whose truth counts
    "output_hidden_states": ["x", -1, [99], (-99,), ["x"], [None], 1.5, {"a": 1}, []],
    "output_attentions": [None, True, "x", 1, []],
}


def prepare(folder: Path):
    student = tiny_student(attn_implementation="eager", window_num_windowed=2)
    config, flags = student.config, tuple(FLAGS)
    config.num_labels = 5
    models = {
        "RadioModel": (student, ("adaptors", "window_size", "pixel_mask", *flags)),
        "RadioModel, packed": (student, ("image_grid_hw", "image_grid_hw", "window_size", "adaptors", "pixel_mask")),
        "RadioForImageClassification": (RadioForImageClassification(config), ("labels", "labels", "pixel_mask")),
        "RadioForSemanticSegmentation": (RadioForSemanticSegmentation(config), ("labels", "labels", "pixel_mask")),
        "RadioBackbone": (RadioBackbone(config), ("pixel_mask", *flags)),
        "RadioVisionTower": (RadioVisionTower.from_radio(student), ("image_sizes", "output_hidden_states")),
    }
    return {name: (model, names, values(model.eval()(**_inputs(name)))) for name, (model, names) in models.items()}


def tiny_student(**fields):
    clip, sam = (dict(summary_dim=dim, feature_dim=6, hidden_dim=16) for dim in (8, None))
    return build(adaptors={"clip": clip, "sam": sam}, **fields)


def _inputs(name: str) -> dict:
    if "packed" in name:
        pixels = torch.rand(12, 768, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": pixels, "image_grid_hw": tensor([[2, 3], [3, 2]])}
    return {"pixel_values": torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))}


def values(output) -> list[torch.Tensor]:
    """What every call returns, whatever else is asked for."""
    names = ("summary", "features", "logits", "pooler_output", "last_hidden_state")
    return [output[name].detach() for name in names if output.get(name) is not None] + [
        value.detach() for value in output.get("feature_maps") or ()
    ]


def same(now: list[torch.Tensor], sound: list[torch.Tensor]) -> bool:
    return len(now) == len(sound) and all(map(torch.equal, now, sound))


def draw(rng: np.random.Generator, world, folder: Path) -> Case:
    name = choose(rng, world)
    model, arguments, sound = world[name]
    argument = choose(rng, ("pixel_values", *arguments))
    value = choose(rng, FLAGS.get(argument) or (NONSENSE[argument] if rng.random() < 0.6 else ANYTHING))
    is_large = isinstance(value, torch.Tensor) and not value.is_nested and value.numel() > 12
    shown = f"{value.dtype} {tuple(value.shape)}" if is_large else " ".join(repr(value).split())[:150]
    return Case(
        f"{name}({argument}={shown})",
        NAMES.get(argument, (argument,)),
        functools.partial(check, model, {**_inputs(name), argument: value}, sound),
    )


def check(model, inputs, sound: list[torch.Tensor]) -> str:
    model.config.problem_type = None  # transformers keeps that of the first labels
    now = values(model(**inputs))
    if not same(now, sound):
        raise OtherBits(f"it is taken, and gives {[tuple(value.shape) for value in now]}")
    return SOUND
