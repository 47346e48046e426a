"""Fields of config.json, bytes of weights and of their index, through everything that opens a student's folder."""

import functools
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from damage import choose, damage_file, nonsense_field
from isolation import SOUND, UNDETECTABLE, Case, OtherBits
from nonsense_calls import same, tiny_student, values
from transformers import AutoModel

import transformers_radio
from transformers_radio import RadioConfig, RadioVisionTower, RadioVisionTowerConfig, load_student

LOADERS = (
    "RadioModel", "RadioModel", "AutoModel", "RadioConfig", "RadioBackboneConfig", "RadioVisionTowerConfig",
    "load_student", "RadioForImageClassification", "RadioForSemanticSegmentation", "RadioBackbone", "RadioVisionTower",
)  # fmt: skip
FIELDS = tuple(vars(RadioConfig())) + ("dtype", "num_labels", "id2label", "problem_type")


def prepare(folder: Path):
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    tiny_student().save_pretrained(folder / "whole")
    tiny_student().save_pretrained(folder / "sharded", max_shard_size="60KB")
    return folder, {loader: open_with(loader, folder / "whole") for loader in LOADERS}


def draw(rng: np.random.Generator, world, folder: Path) -> Case:
    source, sound = world
    os.environ["HF_MODULES_CACHE"] = str(source / "modules")
    kind, loader = choose(rng, ("whole", "sharded")), choose(rng, LOADERS)
    shutil.copytree(source / kind, folder / "student")
    is_config = loader.endswith("Config")
    if rng.random() < (0.9 if is_config else 0.4):
        what, field = nonsense_field(rng, folder / "student" / "config.json", FIELDS)
        names = (field.lstrip("_"), "config")
    else:
        paths = [
            path
            for path in (folder / "student").iterdir()
            if path.suffix != ".py" and not (is_config and path.stem != "config")
        ]
        path = choose(rng, sorted(paths))
        what, names = damage_file(rng, path), (path.name, str(folder / "student"))
    run = functools.partial(check, loader, folder / "student", sound[loader], "config.json" in what)
    return Case(f"{loader}, {kind}: {what}", names, run)


def open_with(loader: str, student: Path, seed: int = 0):
    """What comes out of the student: values of a configuration, outputs of a model."""
    torch.manual_seed(seed)
    if loader.endswith("Config"):
        config = getattr(transformers_radio, loader).from_pretrained(student).to_dict()
        return {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    if loader == "AutoModel":
        model = AutoModel.from_pretrained(student, trust_remote_code=True)
    elif loader == "load_student":
        model = load_student(RadioVisionTower(RadioVisionTowerConfig(radio_config=tiny_student().config)), student)
    else:
        model = getattr(transformers_radio, loader).from_pretrained(student)
    output = model.eval()(torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)))
    heads = (output.get("adaptors") or {}).values()
    return values(output) + [value for head in heads for name, value in head.items() if name != "grid"]


def check(loader: str, student: Path, sound, in_config: bool) -> str:
    now = open_with(loader, student)
    if isinstance(sound, dict):
        return SOUND if now == sound else UNDETECTABLE
    if same(now, sound):
        return SOUND
    if all(value.isfinite().all() for value in now):
        if "For" not in loader and not same(open_with(loader, student, seed=1), now):
            raise OtherBits("some weights are random")
    elif in_config:
        raise OtherBits("the outputs are NaN or infinite")
    return UNDETECTABLE
