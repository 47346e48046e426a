"""Every file of a finished and of an unfinished run, and of its cache, and then the same command again."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState
from damage import choose, damage_file
from isolation import SOUND, Case, OtherBits
from nonsense_recipes import RECIPE
from nonsense_recipes import prepare as make_images

from transformers_radio.training import load_recipe, train
from transformers_radio.training.run import card

# as many files as a run can have: statistics, averages, a cache
OVERRIDES = (
    "loss.standardization=phi_s", "loss.statistics_images=8", "ema_decay=0.9", "data.frozen_crops=true",
)  # fmt: skip


def prepare(folder: Path):
    """A run is known by its recipe, and so by its folders: each case has it at the same place."""
    images, place = make_images(folder), folder / "case"
    place.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(output=place / "run", images=images))
    overrides = [*OVERRIDES, f"teacher_cache={place / 'cache'}"]
    train(load_recipe(folder / "recipe.yaml", overrides))
    shutil.copytree(place, folder / "finished")
    shutil.rmtree(place / "run" / "student")  # as a kill in step 7 leaves it
    for step in (9, 12):
        shutil.rmtree(place / "run" / "checkpoints" / f"step-{step:08}")
    shutil.copytree(place, folder / "unfinished")
    return folder, overrides


def draw(rng: np.random.Generator, world, folder: Path) -> Case:
    source, overrides = world
    kind = choose(rng, ("finished", "unfinished", "unfinished", "unfinished"))
    shutil.copytree(source / kind, folder, dirs_exist_ok=True)
    newest = max(path.name for path in (folder / "run" / "checkpoints").iterdir())
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py")
    often = [path for path in files if newest in path.parts or "checkpoints" not in path.parts]
    path = choose(rng, often if rng.random() < 0.8 else files)
    name = str(path.relative_to(folder))
    what = damage_file(rng, path)
    sound = source / "finished" / "run" / "student"
    run = functools.partial(check, source / "recipe.yaml", overrides, folder / "run", sound, kind == "unfinished")
    return Case(f"{kind}, {name}: {what}", (path.name, str(path.parent)), run)


def check(recipe: Path, overrides: list[str], run: Path, sound: Path, trains: bool) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    train(load_recipe(recipe, overrides))
    # the card and what it was made from are for people; evaluation adds to them
    beside = (card.CARD, card.RECIPE, card.TEACHERS)
    names = sorted(path.name for path in sound.iterdir() if path.is_file() and path.name not in beside)
    others = [
        name
        for name in names
        if not (run / "student" / name).is_file()
        or (run / "student" / name).read_bytes() != (sound / name).read_bytes()
    ]
    if others:
        raise OtherBits(f"the student has other {', '.join(others)}")
    if trains:
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        if steps != sorted(set(steps)) or not {8, 10, 12} <= set(steps):
            raise OtherBits(f"metrics.jsonl has the steps {steps}")
    return SOUND
