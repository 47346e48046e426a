"""What the loop tells the user, and what the user tells the loop: logs and signals; batches on their way."""

import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from transformers_radio.data import Batch
from transformers_radio.training.recipe import Recipe

from .folder import writing

logger = logging.getLogger(__name__)

STEPS_PER_AGREEMENT = 5  # between signals and what the processes do about them: agreeing waits for the device
BOUND_BY_READING = 0.2  # share of the time that training waits for images


def to_device(batch: Batch, device: torch.device) -> dict[int, torch.Tensor]:
    """uint8 travels to the device, float in [0, 1] is made there: side -> (B, 3, side, side)."""
    return {
        side: pixels.to(device, non_blocking=True).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        for side, pixels in batch.images.items()
    }


def raise_if_not_finite(values: dict[str, float], step: int) -> None:
    """Names those that are NaN or infinite, by teacher and head."""
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"the loss is not finite at step {step}: {', '.join(bad)} (teacher/head). The last good checkpoint is "
            "kept; lower optimizer.learning_rate, set mixed_precision=bf16 or no, or look at that teacher's outputs"
        )


class FiniteCheck:
    """Finds losses and gradient norms that are NaN or infinite one step late, so that nobody waits for the device.

    `put` starts a copy of a step's values; `check` reads it once the next step's work has been queued.
    """

    def __init__(self, names: list[str], device: torch.device):
        self.names, self.on_cuda = names, device.type == "cuda"
        self.step: int | None = None
        self.values = torch.zeros(len(names), pin_memory=self.on_cuda)
        self.copied = torch.cuda.Event() if self.on_cuda else None

    def put(self, step: int, terms: torch.Tensor, grad_norm: torch.Tensor | float, scaled: bool) -> None:
        """
        Args:
            terms: (number of names - 1,) sums of each term, on the device.
            grad_norm: the last value, of one element.
            scaled: in fp16 the scaler expects overflows and skips the step, so the norm does not count.
        """
        self.step = step
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        norm = terms.new_zeros(1) if scaled else torch.as_tensor(grad_norm, device=terms.device).reshape(1).to(terms)
        self.values.copy_(torch.cat([terms, norm]), non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def check(self) -> None:
        """Raises FloatingPointError for the values that were put last, with their step and names."""
        if self.step is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        raise_if_not_finite(dict(zip(self.names, self.values.tolist(), strict=True)), self.step)


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
        self.waited = 0.0  # seconds, for images
        self.is_first, self.has_warned = True, False
        self.started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever waits for images."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def write(self, step: int, stage: str, learning_rate: float, grad_norm: Any, skipped: int, progress: tqdm) -> None:
        """On all processes together. `skipped`: images that this process has left out since the start."""
        now = time.perf_counter()
        counts = torch.tensor([self.images, skipped], device=self.accelerator.device)
        images, all_skipped = self.accelerator.reduce(counts, "sum").tolist()
        # The parts of a step's loss add up over the processes.
        sums = torch.stack([self.loss, self.loss.new_tensor(self.waited)])
        loss, waited = self.accelerator.reduce(sums, "sum").tolist()
        data_wait = waited / self.accelerator.num_processes / (now - self.started)
        values = {
            "loss": loss / self.steps,
            **self.terms.means(self.accelerator),
            "lr": learning_rate,
            "grad_norm": float(grad_norm),
            "images_per_second": images / (now - self.started),
            "data_wait": data_wait,
            "skipped": all_skipped,
        }
        if self.accelerator.is_main_process:
            line = {"step": step, "stage": stage, **values}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            heads = " ".join(f"{name}={values[name]:.3f}" for name in values if "/" in name)
            speed = f"{values['images_per_second']:.0f} images/s"
            progress.set_postfix_str(f"{speed} data_wait={data_wait:.0%} loss={values['loss']:.3f} {heads}")
            self._warn_of_reading(data_wait)
        if self.recipe.tracker:
            self.accelerator.log(values, step=step)
        self.loss.zero_()
        self.steps = self.images = 0
        self.waited = 0.0
        self.started = now  # the time that logging takes counts as training

    def _warn_of_reading(self, data_wait: float) -> None:
        if self.is_first or self.has_warned or data_wait < BOUND_BY_READING:
            self.is_first = False  # it holds the start of the workers
            return
        self.has_warned = True
        workers = self.recipe.data.num_workers
        logger.warning(
            "training waits for images during %.0f%% of its time: raise data.num_workers (now %d) if there are cores "
            "left, or store smaller images: a long side of twice the largest resolution is enough",
            100 * data_wait,
            workers,
        )


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
