"""What a run's folder says of the run while it trains. All is read, nothing is written, and no lock is taken."""

import json
import logging
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from transformers_radio.data import SourceError, one_line
from transformers_radio.evaluation.images.resize import cover_image
from transformers_radio.evaluation.models.encoder import load_encoder
from transformers_radio.evaluation.pca import pca_rgb
from transformers_radio.training.groups import stage_groups
from transformers_radio.training.recipe import Recipe, load_recipe
from transformers_radio.training.run.folder import RUN_FILE, find_checkpoints
from transformers_radio.training.run.state import TrainingState
from transformers_radio.visualization.pictures import load_pictures

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
MAX_POINTS = 400  # of a curve
SPEED_LINES = 10  # of the log: the time left follows from their median speed
MAX_CHECKPOINTS = 100  # whose pictures are kept


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step, total_steps: done, and to do in all stages together.
        stage: the name of the last logged step's; None before the first line of the log.
        learning_rate, images_per_second, data_wait: of the last line; `data_wait` is a share of the time.
        seconds_left: at the speed of the last lines; None where that is unknown.
        skipped: images left out so far.
        reasons: reason -> how many, at the newest checkpoint.
        seconds_ago: since the log was last written; None without a log.
        finished: whether the run has left its student.
    """

    step: int
    total_steps: int
    stage: str | None = None
    learning_rate: float | None = None
    images_per_second: float | None = None
    data_wait: float | None = None
    seconds_left: float | None = None
    skipped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds_ago: float | None = None
    finished: bool = False


def open_recipe(run: Path) -> Recipe:
    """The recipe that a run records.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: its recipe is damaged.
    """
    if not (run / RUN_FILE).is_file():
        raise FileNotFoundError(f"{run} holds no run, as it has no {RUN_FILE}: name the output_dir of a recipe.")
    return load_recipe(run / RUN_FILE)


def read_log(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log, in order. A line that is being written, or damaged, is left out."""
    try:
        content = (run / METRICS).read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    for line in content.split(b"\n")[:-1]:  # what follows the last line break is not finished
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            lines.append(values)
    return lines


def loss_terms(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The names "teacher/head" in a log, in the order of their first line."""
    return list(dict.fromkeys(name for line in lines for name in line if "/" in name))


def curve(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one name: of long logs at most `MAX_POINTS` points, evenly chosen, and always the last."""
    points = [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), (int, float))]
    every = -(-len(points) // MAX_POINTS) or 1
    return points[::-1][::every][::-1]


def progress(run: Path, recipe: Recipe, lines: Sequence[dict[str, Any]]) -> Progress:
    """Where the run is, from its log, its newest checkpoint and whether there is a student."""
    total = sum(stage.steps for stage in recipe.stages.values())
    found = Progress(step=0, total_steps=total, finished=(run / "student").is_dir())
    checkpoints = find_checkpoints(run)
    if checkpoints:
        try:
            found.reasons = TrainingState.read(checkpoints[-1]).skipped_images()
        except (OSError, ValueError, TypeError, KeyError):  # deleted meanwhile, or of another version
            pass
    if lines:
        last = lines[-1]
        found.step, found.stage = last["step"], last.get("stage")
        found.learning_rate, found.data_wait = last.get("lr"), last.get("data_wait")
        found.images_per_second, found.skipped = last.get("images_per_second"), last.get("skipped", 0)
        found.seconds_left = _seconds_left(recipe, lines)
        try:
            found.seconds_ago = max(0.0, time.time() - (run / METRICS).stat().st_mtime)
        except FileNotFoundError:
            pass
    return found


def _seconds_left(recipe: Recipe, lines: Sequence[dict[str, Any]]) -> float | None:
    speeds = [line["images_per_second"] for line in lines[-SPEED_LINES:] if line.get("images_per_second")]
    if not speeds:
        return None
    images, first = 0, 0  # the images to come; the first step of the stage
    for name, stage in recipe.stages.items():
        done = min(max(lines[-1]["step"] - first, 0), stage.steps)
        for group in stage_groups(name, stage, list(recipe.teachers)):
            images += group.batch_size * (group.turns_before(stage.steps) - group.turns_before(done))
        first += stage.steps
    return images / statistics.median(speeds)


def load_images(recipe: Recipe, data: str | None, count: int) -> list[Image.Image]:
    """The images that show how the features change: `data`, or the first of those that the run trains on.

    Raises:
        OSError, ValueError: there are none, or they cannot be read.
    """
    config = recipe.data
    if data is None:
        first = next(iter(config.sources.values()), None) if config.sources else config
        assert first is not None
        data, split, column = first.path, first.split, first.image_column
        return [one.image for one in load_pictures(data, count, split, column)]
    return [one.image for one in load_pictures(data, count)]


@torch.no_grad()
def checkpoint_colors(checkpoint: Path, images: Sequence[Image.Image]) -> list[torch.Tensor]:
    """The student's features of each image as colors, float32 (h, w, 3) in [0, 1].

    The images of a checkpoint share a basis; colors of different checkpoints do not compare.

    Raises:
        OSError, ValueError, SafetensorError: the checkpoint is gone, or damaged.
    """
    student = load_encoder(str(checkpoint))
    side = (student.image_size, student.image_size)
    encoded = [student.features(cover_image(image, side)[None].float() / 255) for image in images]
    return pca_rgb([features[0] for features, _ in encoded], [grid for _, grid in encoded])


class Watcher:
    """Looks at a run every few seconds, and keeps the pictures of checkpoints that training has deleted meanwhile.

    Attributes:
        lines: the log.
        pictures: step -> the colors of each image, see `checkpoint_colors`.
        images: what they show; empty without.
        note: why there are no pictures, or "".
    """

    def __init__(self, run: Path, data: str | None = None, count: int = 4):
        self.run, self.recipe = run, open_recipe(run)
        self.lines: list[dict[str, Any]] = []
        self.pictures: dict[int, list[torch.Tensor]] = {}
        self.images: list[Image.Image] = []
        self.note = "" if count else "Pictures were left out with --images 0."
        self._failed: dict[Path, str] = {}
        self._stopped = threading.Event()
        if count:
            try:
                self.images = load_images(self.recipe, data, count)
            except (OSError, ValueError, SourceError) as error:
                if data is not None:
                    raise
                self.note = f"No pictures: {' '.join(str(error).split())} Name images with --data."

    def look(self) -> None:
        """Reads what is new."""
        self.lines = read_log(self.run)
        for checkpoint in find_checkpoints(self.run) if self.images else ():
            step = int(checkpoint.name.removeprefix("step-"))
            if step in self.pictures or checkpoint in self._failed:
                continue
            try:
                self.pictures[step] = checkpoint_colors(checkpoint, self.images)
            except (OSError, ValueError, SafetensorError) as error:
                self._failed[checkpoint] = one_line(error)
                if checkpoint.exists():  # training deletes old ones; that is no news
                    logger.warning("%s is not shown: %s", checkpoint, one_line(error))
        for step in sorted(self.pictures)[:-MAX_CHECKPOINTS]:
            del self.pictures[step]

    def start(self, every_seconds: float) -> None:
        """Looks now, and then every few seconds in a thread, until `stop`."""
        self.look()
        threading.Thread(target=self._keep_looking, args=(every_seconds,), daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _keep_looking(self, every_seconds: float) -> None:
        while not self._stopped.wait(every_seconds):
            try:
                self.look()
            except OSError as error:  # a disk over the network may come back
                logger.warning("%s cannot be read: %s", self.run, one_line(error))

    def progress(self) -> Progress:
        return progress(self.run, self.recipe, self.lines)
