"""Runs of `train` with a ViT-B: what its loop costs, where it waits for the device, DDP, FSDP2, kill and resume."""

import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Setup, seconds
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import transformers_radio
from transformers_radio.data import Batch
from transformers_radio.teachers import Teacher
from transformers_radio.training import Recipe, load_recipe, stage, train
from transformers_radio.training.distill import build_distillation
from transformers_radio.training.groups import stage_groups
from transformers_radio.training.plan.count import describe_teacher
from transformers_radio.training.recipe import TeacherRecipe
from transformers_radio.training.student import TeacherShape, build_student
from transformers_radio.training.teachers import load_teacher

INTERVAL = 10  # steps between two lines of the log, on a GPU
RECIPE = """
output_dir: {folder}/run
student: {{size: {size}, config: {{num_hidden_layers: {layers}, max_img_size: 512}}}}
teachers:
  teacher:
    type: python
    checkpoint: "{teacher}"
    dtype: bfloat16
    options: {{target: "training_runs:RandomTeacher"}}
data: {{path: {folder}/images, num_workers: {workers}}}
stages:
  main: {{steps: {steps}, resolution: {side}, batch_size: {batch}, warmup_steps: 2}}
mixed_precision: bf16
checkpoints: {{every_steps: {every}, keep: 2}}
log_every_steps: {interval}
tracker: null
"""
FULL = {"size": "vit-b-16", "layers": 12, "side": 256, "batch": 64, "workers": 8, "interval": INTERVAL}
FULL |= {"teacher": "transformers:facebook/dinov2-with-registers-base"}
TINY = {"size": "vit-ti-16", "layers": 2, "side": 32, "batch": 2, "workers": 0, "interval": 2}
TINY |= {"teacher": "open_clip:package:quickstart/teachers/clip"}
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
PACKAGE = Path(transformers_radio.__file__).parent
SYNCHRONIZING = "called a synchronizing CUDA operation"  # torch's warning


class RandomTeacher(Teacher):
    """TYPE:CHECKPOINT with random weights, always the same ones."""

    def __init__(self, checkpoint: str, image_size: int | None = None, dtype: str = "float32"):
        from training import random_weights

        kind, _, name = checkpoint.partition(":")
        side = image_size or (224 if kind == "transformers" else None)
        described = describe_teacher("teacher", TeacherRecipe(kind, name, image_size=side, dtype=dtype))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random_weights(described, "cpu")
        widths = {
            name: getattr(described, name) for name in ("image_size", "patch_size", "summary_dim", "feature_dim")
        }
        super().__init__(described.model, **widths, normalization=((0.5,) * 3, (0.25,) * 3))
        self.encode = described.encode  # type: ignore[method-assign]

    @classmethod
    def from_checkpoint(cls, checkpoint: str, image_size: int | None = None, dtype: str = "float32") -> Teacher:
        return cls(checkpoint, image_size, dtype)


def make_recipe(folder: Path, setup: Setup, steps: int, every: int) -> Path:
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    for number in range(8 if setup.dry else 256):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((320, 288), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg")
    values = {"folder": folder, "steps": steps, "every": every, **(TINY if setup.dry else FULL)}
    (folder / "recipe.yaml").write_text(RECIPE.format(**values))
    return folder / "recipe.yaml"


def milliseconds(recipe: Recipe, first_step: int = 0) -> float:
    """Of a step of a run, by its log, from the interval after `first_step` on."""
    lines = [json.loads(line) for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if line["step"] > first_step]
    return 1e3 * recipe.stages["main"].batch_size / statistics.median(speeds) if speeds else float("nan")


def overhead(setup: Setup) -> list[dict[str, Any]]:
    """`train` over a bare loop of the same models, both on images that are on the device."""
    interval = TINY["interval"] if setup.dry else INTERVAL
    steps = interval * (4 if setup.dry else 8)
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(make_recipe(Path(name), setup, steps, every=steps))
        bare = 1e3 * seconds(bare_loop(recipe, setup.device), setup, budget=2)
        waits = Synchronizations(setup.device)

        def watch(step: int) -> None:
            if step == interval:  # the second line of the log: the first one's steps warm up
                waits.__enter__()
            if step == 2 * interval:
                waits.__exit__(None, None, None)

        run_training(recipe, setup.device, watch)
        loop = milliseconds(recipe, first_step=2 * interval)
    places = ", ".join(f"{place} x{count / interval:g}" for place, count in waits.places.most_common())
    return [
        {"name": "train, its own loop", "ms": loop, "bare ms": bare, "overhead %": 100 * (loop / bare - 1)},
        {"name": "synchronizations", "in a step": waits.places.total() / interval, "places": places},
    ]


def bare_loop(recipe: Recipe, device: torch.device) -> Callable[[], None]:
    from training import bare_step

    teachers = {name: load_teacher(name, spec).to(device) for name, spec in recipe.teachers.items()}
    with torch.device(device):
        student = build_student(recipe, {name: TeacherShape.of(teacher) for name, teacher in teachers.items()})
    (group,) = stage_groups("main", recipe.stages["main"], list(teachers))
    model = build_distillation(recipe, "main", student).train()
    return bare_step(recipe, "main", group, model, teachers, device)


def run_training(recipe: Recipe, device: torch.device, watch: Callable[[int], None]) -> None:
    """`train` on one batch that stays on the device; `watch` is called with the number of each step before it."""
    open_stream = stage.open_stream
    stage.open_stream = lambda *arguments, **options: DeviceStream(open_stream(*arguments, **options), device, watch)
    try:
        train(recipe)
    finally:
        stage.open_stream = open_stream


class DeviceStream:
    """The first batch of a stream, on the device, again and again."""

    def __init__(self, stream: Any, device: torch.device, watch: Callable[[int], None]):
        self.stream, self.device, self.watch = stream, device, watch

    def __iter__(self) -> Iterator[Batch]:
        batch = next(iter(self.stream))
        batch = replace(batch, images={side: pixels.to(self.device) for side, pixels in batch.images.items()})
        for number in itertools.count():
            self.watch(number)
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Synchronizations:
    """Counts where the host waits for the device: `places` is file:line of this package -> times."""

    def __init__(self, device: torch.device):
        self.device = device
        self.places: Counter[str] = Counter()

    def __enter__(self) -> None:
        self.catch: AbstractContextManager = warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note  # type: ignore[assignment]
        self.items = WarnOfItems()
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        else:
            self.items.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        else:
            self.items.__exit__(*error)
        self.catch.__exit__(*error)

    def _note(self, message: Any, category: Any, filename: str, line: int, *_: Any) -> None:
        if SYNCHRONIZING not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        if stack:
            filename, line = stack[-1].filename, stack[-1].lineno or 0
        self.places[f"{Path(filename).name}:{line}"] += 1


class WarnOfItems(TorchDispatchMode):
    """Warns as CUDA would where a number is read from a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            warnings.warn(SYNCHRONIZING, stacklevel=2)
        return func(*args, **(kwargs or {}))


def kill_and_resume(setup: Setup) -> list[dict[str, Any]]:
    """One rank under DDP, killed after its first checkpoint, and continued to the end under FSDP2."""
    steps, every = (16, 4) if setup.dry else (80, 40)
    with tempfile.TemporaryDirectory() as name:
        path = make_recipe(Path(name), setup, steps, every)
        recipe = load_recipe(path)
        run = Path(recipe.output_dir)
        process = launch(path, ONE_RANK, setup)
        try:
            while not list(run.glob("checkpoints/step-*[0-9]")) and process.poll() is None:
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"under DDP it ended with exit code {process.returncode} before it could be killed")
        before = milliseconds(recipe)
        reached = max(int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*[0-9]"))
        process = launch(path, {**ONE_RANK, **FSDP2}, setup)
        try:
            code = process.wait()
        finally:
            process.kill()
        lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        interval = TINY["interval"] if setup.dry else INTERVAL
        finished = code == 0 and (run / "student" / "config.json").is_file()
        whole = finished and lines == [*range(interval, steps + 1, interval)]
        after = milliseconds(recipe, reached + interval)
    return [
        {"name": "DDP, one rank, killed with -9", "ms": before, "last checkpoint": reached},
        {"name": "FSDP2, one rank, resumed", "ms": after, "status": "ok" if whole else "FAIL", "exit code": code},
    ]


def launch(recipe: Path, environment: dict[str, str], setup: Setup) -> subprocess.Popen:
    """`python -m transformers_radio.training`, as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {**environment, "MASTER_PORT": str(free.getsockname()[1])}
    if setup.dry:
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "transformers_radio.training", str(recipe), "--trust-code"]
    return subprocess.Popen(command, env={**os.environ, **environment})
