"""Fields and bytes of preprocessor_config.json."""

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from damage import choose, damage_file, nonsense_field
from isolation import SOUND, UNDETECTABLE, Case, OtherBits
from transformers import AutoImageProcessor

from transformers_radio import RadioImageProcessor

SIZES = ({"height": 64, "width": 32}, {"shortest_edge": 48}, {"longest_edge": 48})
FIELDS = (
    "size",
    "size",
    "crop_size",
    "pad_size",
    "data_format",
    "input_data_format",
    "disable_grouping",
    "device",
    "return_tensors",
)


def prepare(folder: Path):
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    for number, size in enumerate(SIZES):
        RadioImageProcessor(size=size).save_pretrained(folder / str(number))
    return folder, [open_with(RadioImageProcessor, folder / str(number)) for number in range(len(SIZES))]


def draw(rng: np.random.Generator, world, folder: Path) -> Case:
    source, sound = world
    os.environ["HF_MODULES_CACHE"] = str(source / "modules")
    number = int(rng.integers(len(SIZES)))
    shutil.copytree(source / str(number), folder / "student")
    path = folder / "student" / "preprocessor_config.json"
    loader = RadioImageProcessor
    if rng.random() < 0.7:
        what, field = nonsense_field(rng, path, FIELDS)
        names = (field, path.name, "size" if "size" in what else field)
        if field not in ("auto_map", "AutoImageProcessor", "image_processor_type"):  # transformers' own errors
            loader = choose(rng, (RadioImageProcessor, AutoImageProcessor))
    else:
        names = (path.name, path.parent.name, *json.loads(path.read_text()))
        what = damage_file(rng, path)
    run = functools.partial(check, loader, path.parent, sound[number])
    return Case(f"{loader.__name__}, {SIZES[number]}: {what}", names, run)


def open_with(loader, student: Path) -> torch.Tensor:
    options = {} if loader is RadioImageProcessor else {"trust_remote_code": True}
    processor = loader.from_pretrained(student, **options)
    image = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(0))
    return processor(image, return_tensors="pt")["pixel_values"]


def check(loader, student: Path, sound: torch.Tensor) -> str:
    now = open_with(loader, student)
    if now.shape == sound.shape and torch.equal(now, sound):
        return SOUND
    if now.ndim != 4 or now.dtype != torch.float32 or not (now.amin() >= 0 and now.amax() <= 1):
        raise OtherBits(f"it gives {now.dtype} {tuple(now.shape)} in [{now.amin()}, {now.amax()}]")
    return UNDETECTABLE
