"""The quickstart trained on the device: time, table, and whether ten times the steps beat the teachers."""

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import Case, Setup

from transformers_radio.evaluation.models.encoder import VisionEncoder
from transformers_radio.quickstart.measure import Yardstick, measure
from transformers_radio.quickstart.run import DEFAULT, STUDENT, STUDENTS, load_encoders
from transformers_radio.quickstart.world import make_world
from transformers_radio.training import Recipe, load_recipe, train

LONGER = 10
SCENES = {"train": 8000, "validation": 1600}
TINY_SCENES = {"train": 48, "validation": 8}
SPARE = 1.3  # what a second training and evaluation are expected to take over the first


def cases(setup: Setup) -> list[Case]:
    return [Case("quickstart", lambda: quickstart(setup), limit=900)]


def quickstart(setup: Setup) -> list[dict[str, Any]]:
    """Rows of both tables. The longer run has ten times the steps, or as many as there is time for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.time()
        cores = len(os.sched_getaffinity(0))
        make_world(
            folder / "world", **(TINY_SCENES if setup.dry else SCENES), workers=1 if setup.dry else min(cores, 10)
        )
        drawn = time.time() - began
        recipe = make_recipe(folder, setup, workers=min(cores - 1, 8))
        steps = recipe.stages["main"].steps
        teachers, rows, seconds = run(recipe, teachers=None)
        rows[-1]["world s"] = drawn
        times = (setup.until - time.time() - SPARE * seconds["evaluation s"]) / (SPARE * seconds["training s"])
        factor = min(2 if setup.dry else LONGER, times)
        if factor < 2:
            reason = f"{100 * max(times, 0):.0f} % of the steps would have fitted; raise --seconds"
            return [*rows, {"name": f"student, {LONGER} times the steps", "status": "no time", "reason": reason}]
        longer = replace(recipe, output_dir=str(folder / "longer"))
        longer.stages = {"main": replace(recipe.stages["main"], steps=int(factor * steps))}
        return [*rows, *run(longer, teachers)[1][-1:]]


def make_recipe(folder: Path, setup: Setup, workers: int) -> Recipe:
    overrides = [f"output_dir={folder}/run", f"data.path={folder}/world", f"teacher_cache={folder}/teachers"]
    overrides += [f"data.num_workers={workers}"]  # one worker reads less than a GPU learns from
    if setup.dry:
        overrides += ["stages.main.steps=2", "stages.main.warmup_steps=1", "loss.statistics_images=24"]
        overrides += [
            "stages.main.groups.low.batch_size=4",
            "stages.main.groups.mid.batch_size=2",
            "stages.main.groups.high.batch_size=2",
            "data.num_workers=0",
        ]
    return load_recipe(STUDENTS[DEFAULT][0], overrides)


def run(
    recipe: Recipe, teachers: dict[str, dict[str, Any]] | None
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
    """Trains and evaluates.

    Args:
        teachers: name -> what an earlier run measured of them.

    Returns:
        The teachers' columns, all rows with the student's last, and seconds.
    """
    started = time.time()
    result = train(recipe)
    trained = time.time()
    if result.student_dir is None:
        raise RuntimeError("the training was stopped by a signal")
    encoders = load_encoders(recipe, result.student_dir)
    yardstick = Yardstick(Path(recipe.data.path or ""), recipe)
    columns = {e.name: measured(e, yardstick, teachers) for e in encoders}
    seconds = {"training s": trained - started, "evaluation s": time.time() - trained}
    student = columns.pop(STUDENT)
    best = {name: max(row[name] or 0.0 for row in columns.values()) for name in student}
    wins = [name for name in student if (student[name] or 0.0) > best[name]]
    steps = recipe.stages["main"].steps
    row = {"name": f"student, {steps} steps", **student, "better than all teachers in": ", ".join(wins) or "none"}
    row |= {**seconds, "steps/s": steps / seconds["training s"]}
    return columns, [*({"name": name, **values} for name, values in columns.items()), row], seconds


def measured(
    encoder: VisionEncoder, yardstick: Yardstick, known: dict[str, dict[str, Any]] | None
) -> dict[str, float | None]:
    """Zero-shot, k-NN, mIoU and Masks in percent, on the CPU as the command has it."""
    return known[encoder.name] if known and encoder.name in known else measure(encoder, yardstick)
