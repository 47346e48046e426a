"""What the loop tells the user, and what the user tells the loop: logs and signals; batches on their way."""

import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from transformers_radio.data import Batch

from .recipe import Recipe
from .run_folder import writing


def to_device(batch: Batch, device: torch.device) -> dict[int, torch.Tensor]:
    """uint8 travels to the device, float in [0, 1] is made there: side -> (B, 3, side, side)."""
    return {
        side: pixels.to(device, non_blocking=True).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        for side, pixels in batch.images.items()
    }


class TermSums:
    """Sums of each loss term over images, which the processes see different ones of."""

    def __init__(self, terms: list[str], device: torch.device):
        self.terms = terms
        self.columns = {name: column for column, name in enumerate(terms)}
        self.sums = torch.zeros(2, len(terms), device=device)  # float32: of the values, and of their images

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """terms: name -> (B,)."""
        for name, values in terms.items():
            self.sums[0, self.columns[name]] += values.sum()
            self.sums[1, self.columns[name]] += len(values)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all processes' images of the terms that were seen, and a new start. On all processes together."""
        totals, images = accelerator.reduce(self.sums, "sum").tolist()
        self.sums.zero_()
        return {name: totals[i] / images[i] for i, name in enumerate(self.terms) if images[i]}


class Log:
    """Means over a log interval, to metrics.jsonl, the tracker and the progress bar."""

    def __init__(self, accelerator: Accelerator, path: Path, recipe: Recipe, terms: list[str]):
        self.accelerator, self.path, self.recipe = accelerator, path, recipe
        self.terms = TermSums(terms, accelerator.device)
        self.loss = torch.zeros((), device=accelerator.device)
        self.steps = self.images = 0
        self.started = time.perf_counter()

    def write(self, step: int, stage: str, learning_rate: float, grad_norm: Any, skipped: int, progress: tqdm) -> None:
        """On all processes together. `skipped`: images that this process has left out since the start."""
        now = time.perf_counter()
        counts = torch.tensor([self.images, skipped], device=self.accelerator.device)
        images, all_skipped = self.accelerator.reduce(counts, "sum").tolist()
        # The parts of a step's loss add up over the processes.
        loss = float(self.accelerator.reduce(self.loss, "sum")) / self.steps
        values = {
            "loss": loss,
            **self.terms.means(self.accelerator),
            "lr": learning_rate,
            "grad_norm": float(grad_norm),
            "images_per_second": images / (now - self.started),
            "skipped": all_skipped,
        }
        if self.accelerator.is_main_process:
            line = {"step": step, "stage": stage, **values}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            heads = " ".join(f"{name}={values[name]:.3f}" for name in values if "/" in name)
            progress.set_postfix_str(f"{values['images_per_second']:.0f} images/s loss={values['loss']:.3f} {heads}")
        if self.recipe.tracker:
            self.accelerator.log(values, step=step)
        self.loss.zero_()
        self.steps = self.images = 0
        self.started = now  # the time that logging takes counts as training


class StopSignal:
    """Remembers the first Ctrl-C or SIGTERM, so that the step in hand ends and is saved; a second one is immediate.

    `number` is what all processes have agreed on.
    """

    def __init__(self) -> None:
        self.received = 0  # by this process
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self.__exit__()

    def agreed(self, accelerator: Accelerator) -> bool:
        """True on every process as soon as one has been told to stop: all must save the same step."""
        number = self.received
        if accelerator.num_processes > 1:  # a signal that comes while they talk counts the next time
            number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
        self.number = number or None
        return self.number is not None
