"""Recipes of damaged text, with nonsense in any field, and overrides: read, planned, prepared for training."""

import copy
import functools
import math
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints
from unittest import mock

import numpy as np
import yaml
from accelerate.state import AcceleratorState
from damage import VALUES, choose, damage
from isolation import UNDETECTABLE, Case, OtherBits
from streams import picture

from transformers_radio.training import load_recipe, train
from transformers_radio.training.plan.tables import print_plan
from transformers_radio.training.recipe import Recipe, recipe_to_dict

sys.path.append(str(Path(__file__).parents[1]))  # run.py is started by its path
from helpers import tiny_recipe  # noqa: E402

RECIPE = tiny_recipe.RECIPE.replace("shuffle_window: 8", "shuffle_window: 8, retry_seconds: 0")

MORE_VALUES = (
    *VALUES, {1: {2: 3}}, "${oc.env:NOPE}", "${package:}", "${", "/dev/null", "/proc/1/mem", "2024-01-01", "~nobody/x",
    "x:y",
)  # fmt: skip
OVERRIDES = (
    "=", "=1", "x", "a=b=c", "stages", "stages=", "stages.=1", ".steps=1", "[0]=1", "stages[0]=1",
    "stages.main.steps[0]=1", "${x}=1", "stages.main={", "data.path=[", "data.crop_scale=[1", "data.crop_scale.0=x",
    "teachers.clip.options.a.b.c=1", "teachers.new.type=python", "stages.new.steps=1",
    "stages.main.groups.g.resolution=32", "seed=!!python/object:os.system", "\0=1",
    "student.config.patch_size=&a [*a]", "data.sources.a.path=x", "a" * 3000 + "=1", "seed=1\nseed=2", "seed==1",
    "data={path: 1}",
)  # fmt: skip
TEXTS = (
    "", "null", "[]", "x", "1", "---\n---\n", "\ufeff", "a: &a [*a]", "stages: &s {main: *s}", "a: b: c", "\t- x",
    "{" * 3000, "[" * 3000, "&a [" * 200 + "]" * 200, "!!python/object/apply:os.getcwd []",
    "output_dir: ${output_dir}", "output_dir: ${stages}",
    "x: &x0 [x,x]\n" + "".join(f"x{n}: &x{n + 1} [{f'*x{n},' * 9}]\n" for n in range(9)), "? [a]\n: 1", "1: 2",
    "null: 1", "%YAML 9.9\n---\n", "data: !!binary x", "seed: 2024-01-01", "seed: !!set {a}", "<<: 1", "<<: {seed: 1}",
    "seed: 0o8\n...\nx",
)  # fmt: skip


def prepare(folder: Path) -> str:
    (folder / "images").mkdir()
    for number in range(12):
        (folder / "images" / f"{number}.png").write_bytes(picture(number, "PNG"))
    return str(folder / "images")


def fields(schema, prefix=()):
    """The path of every field, through one entry of each dictionary."""
    for name, hint in get_type_hints(schema).items():
        yield (*prefix, name)
        inner, keys = hint, {"teachers": "clip", "stages": "main", "groups": "g", "sources": "s"}
        if get_args(hint) and is_dataclass(get_args(hint)[-1]):
            inner, name = get_args(hint)[-1], (name, keys[name])
            yield (*prefix, *name)
        if is_dataclass(inner):
            yield from fields(inner, (*prefix, *([name] if isinstance(name, str) else name)))


def draw(rng: np.random.Generator, images: str, folder: Path) -> Case:
    text, overrides, names = RECIPE.format(output=folder / "run", images=images), [], ("recipe.yaml",)
    kind = choose(rng, ("field", "field", "field", "override", "text", "whole"))
    every = [*fields(Recipe), *(("student", "config", name) for name in yaml.safe_load(text)["student"]["config"])]
    if kind in ("field", "override") and rng.random() < 0.8:
        path, value = choose(rng, every), choose(rng, MORE_VALUES)
        names = (path[-1], *(".".join(other) for other in every if len(other) > 1))
        what = f"{'.'.join(path)} = {value!r}"
        if kind == "override":
            overrides = [f"{'.'.join(path)}={'null' if value is None else value}"]
        else:
            values = copy.deepcopy(yaml.safe_load(text))
            inside = values
            for part in path[:-1]:
                inside = inside.setdefault(part, {})
            inside[path[-1]] = value
            text = yaml.safe_dump(values, sort_keys=False)
    elif kind in ("field", "override"):
        overrides = [choose(rng, OVERRIDES)]
        key = overrides[0].split("=")[0]
        names, what = (key or "override", "override", *map(".".join, every)), f"override {overrides[0]!r}"
    elif kind == "text":
        names = (*names, *get_type_hints(Recipe))
        what, content = damage(rng, text.encode())
        (folder / "recipe.yaml").write_bytes(content)
        text = ""
    else:
        added = choose(rng, TEXTS)
        text = choose(rng, (added, text + added))
        names, what = (*names, *get_type_hints(Recipe)), f"{text[-60:]!r} of {len(text)} characters"
    if text or kind != "text":
        (folder / "recipe.yaml").write_text(text)
    return Case(f"{kind}: {what}"[:300], names, functools.partial(check, folder / "recipe.yaml", overrides))


def check(path: Path, overrides: list[str]) -> str:
    recipe = load_recipe(path, overrides)
    print_plan(recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    with mock.patch.multiple(train.__module__, train_stage=mock.DEFAULT, finish=mock.DEFAULT):
        train(recipe)  # all that comes before the first step
    for name, value in _flat(recipe_to_dict(recipe)):
        if isinstance(value, float) and not math.isfinite(value):
            raise OtherBits(f"{name} {value} is taken")
    return UNDETECTABLE


def _flat(values, prefix=""):
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list, tuple)):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
