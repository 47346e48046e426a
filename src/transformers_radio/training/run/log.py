"""What the loop reports: means of losses in metrics.jsonl and on the progress bar; losses that are not finite."""

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from transformers_radio.disk import writing
from transformers_radio.training.losses import Term

from .state import Run

logger = logging.getLogger(__name__)

BOUND_BY_READING = 0.2  # warn when training spends this share of its time waiting for images


def raise_if_not_finite(values: dict[str, float], step: int) -> None:
    """Raises FloatingPointError with the names of the values that are NaN or infinite."""
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise FloatingPointError(
            f"the loss is not finite at step {step}: {', '.join(bad)} (teacher/head). The last good checkpoint is "
            "kept; lower optimizer.learning_rate, set mixed_precision=bf16 or no, or look at that teacher's outputs"
        )


class FiniteCheck:
    """Finds losses and gradient norms that are NaN or infinite one step late, so that no step waits for the device.

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
            terms: (number of names - 1,), the sum of each term, on the device.
            grad_norm: one number, which has the last name.
            scaled: whether a gradient scaler (fp16) skips the step after an overflow, so that the norm does not count.
        """
        self.step = step
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        norm = terms.new_zeros(1) if scaled else torch.as_tensor(grad_norm, device=terms.device).reshape(1).to(terms)
        self.values.copy_(torch.cat([terms, norm]), non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def check(self) -> None:
        """Raises FloatingPointError if a value of the last `put` is not finite, with its step and name."""
        if self.step is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        raise_if_not_finite(dict(zip(self.names, self.values.tolist(), strict=True)), self.step)


class TermSums:
    """The sum of each term's losses over images, and how many images had the term; each process has its own."""

    def __init__(self, terms: list[Term], accelerator: Accelerator):
        self.terms, self.accelerator = terms, accelerator
        self.columns = {term: column for column, term in enumerate(terms)}
        self.sums = torch.zeros(2, len(terms), device=accelerator.device)  # float32: losses, images

    def add(self, losses: dict[Term, torch.Tensor]) -> None:
        """losses: term -> (B,)."""
        for term, values in losses.items():
            self.sums[0, self.columns[term]] += values.sum()
            self.sums[1, self.columns[term]] += len(values)

    def means(self) -> dict[Term, float]:
        """Means over the images of all processes, of the terms that any had. Called on all processes together."""
        losses, images = self.accelerator.reduce(self.sums, "sum").tolist()
        return {term: losses[i] / images[i] for i, term in enumerate(self.terms) if images[i]}


class Log:
    """Means over a log interval, for metrics.jsonl, the tracker and the progress bar.

    Attributes:
        loss: this process's part of the sum of the steps' losses.
        images: how many this process has trained on.
        waited: seconds that it has waited for images.
    """

    def __init__(self, run: Run, terms: list[Term]):
        self.run, self.path = run, run.output_dir / "metrics.jsonl"
        self.sums = TermSums(terms, run.accelerator)
        self.loss = torch.zeros((), device=run.accelerator.device)
        self.steps = self.images = 0
        self.waited = 0.0
        self.is_first, self.has_warned = True, False
        self.started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures a block that waits for images."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, sums: TermSums) -> None:
        """Adds the losses of one step."""
        self.sums.sums += sums.sums
        self.steps += 1

    def write(self, stage: str, learning_rate: float, grad_norm: Any, skipped: int) -> None:
        """Writes the means since the last time, and starts anew. Called on all processes together.

        Args:
            stage: its name.
            skipped: images that this process has left out since the start.
        """
        accelerator, step = self.run.accelerator, self.run.state.step
        now = time.perf_counter()
        counts = torch.tensor([self.images, skipped], device=accelerator.device)
        images, all_skipped = accelerator.reduce(counts, "sum").tolist()
        # The parts of a step's loss add up over the processes.
        sums = torch.stack([self.loss, self.loss.new_tensor(self.waited)])
        loss, waited = accelerator.reduce(sums, "sum").tolist()
        data_wait = waited / accelerator.num_processes / (now - self.started)
        terms = {str(term): mean for term, mean in self.sums.means().items()}
        values = {
            "loss": loss / self.steps,
            **terms,
            "lr": learning_rate,
            "grad_norm": float(grad_norm),
            "images_per_second": images / (now - self.started),
            "data_wait": data_wait,
            "skipped": all_skipped,
        }
        if accelerator.is_main_process:
            line = {"step": step, "stage": stage, **values}
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            speed = f"{values['images_per_second']:.0f} images/s"
            heads = " ".join(f"{name}={mean:.3f}" for name, mean in terms.items())
            self.run.progress.set_postfix_str(f"{speed} data_wait={data_wait:.0%} loss={values['loss']:.3f} {heads}")
            self._warn_of_reading(data_wait)
        if self.run.recipe.tracker:
            accelerator.log(values, step=step)
        self.sums.sums.zero_()
        self.loss.zero_()
        self.steps = self.images = 0
        self.waited = 0.0
        self.started = now  # the time that logging takes counts as training

    def _warn_of_reading(self, data_wait: float) -> None:
        if self.is_first or self.has_warned or data_wait < BOUND_BY_READING:
            self.is_first = False  # the first interval includes the start of the workers
            return
        self.has_warned = True
        workers = self.run.recipe.data.num_workers
        logger.warning(
            "training waits for images during %.0f%% of its time: raise data.num_workers (now %d) if there are cores "
            "left, or store smaller images: a long side of twice the largest resolution is enough",
            100 * data_wait,
            workers,
        )
