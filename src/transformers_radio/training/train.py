"""The training loop: one Accelerate process group, one student, frozen teachers, streamed images."""

import json
import signal
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, set_seed
from tqdm.auto import tqdm

from transformers_radio.data import Batch, ImageStream
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher

from .checkpoint import load_checkpoint, publish_student, save_checkpoint, skipped_images
from .checks import check_before_training
from .distill import (
    build_student,
    build_teachers,
    distillation_losses,
    raise_if_not_finite,
    teacher_targets,
    weighted_sum,
)
from .optimizer import build_optimizer, start_schedule
from .recipe import Recipe, StageRecipe, micro_batch
from .run_folder import find_run, open_run, truncate_metrics


@dataclass
class TrainResult:
    """What a run leaves. `student_dir` is None when a signal stopped it before the end (`signal` says which)."""

    student_dir: Path | None
    step: int
    skipped: dict[str, int] = field(default_factory=dict)  # images left out so far, by reason
    signal: int | None = None


def train(recipe: Recipe) -> TrainResult:
    """Distils the recipe's teachers into its student; continues by itself what an earlier start left unfinished.

    Called by every process of the group. A run that was killed at any moment and started again ends, on a CPU with
    the same number of threads, with the same bits as one that was not.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before the first step, naming the field and the fix.
        FloatingPointError: a loss is NaN or infinite; the last good checkpoint is kept.
    """
    output_dir = Path(recipe.output_dir)
    accelerator = _accelerator(recipe)
    # Only the main process touches the folder; the others are told what it found.
    finished, resume_from = _on_main_process(accelerator, lambda: find_run(recipe))
    student_dir = output_dir / "student"
    if finished:
        accelerator.print(f"{student_dir} is finished; choose another output_dir, or set overwrite=true to start over")
        return TrainResult(student_dir, sum(stage.steps for stage in recipe.stages.values()))

    set_seed(recipe.seed)  # the same initial student on every process
    teachers = build_teachers(recipe, accelerator.device)
    model = build_student(recipe, teachers)
    check_before_training(recipe, model, teachers, accelerator)
    # Nothing in output_dir has changed so far; from here on this process group owns it.
    with open_run(recipe, resume_from) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        return _distil(recipe, accelerator, model, teachers, resume_from)


def _distil(
    recipe: Recipe, accelerator: Accelerator, model: RadioModel, teachers: dict[str, Teacher], resume_from: Path | None
) -> TrainResult:
    """Runs the stages from the checkpoint on, and publishes the student at the end."""
    output_dir = Path(recipe.output_dir)
    total_steps = sum(stage.steps for stage in recipe.stages.values())
    student = accelerator.prepare(model)
    optimizer = accelerator.prepare(build_optimizer(student, recipe.optimizer))
    set_seed(recipe.seed, device_specific=True)  # from here on every process samples its own position crops

    state: dict[str, Any] = {"step": 0, "stage": None, "stream": None}
    if resume_from is not None:
        state = load_checkpoint(accelerator, resume_from)
        accelerator.print(f"continuing {output_dir} from step {state['step']} of {total_steps}")
    if accelerator.is_main_process:
        truncate_metrics(output_dir / "metrics.jsonl", state["step"])
    if recipe.tracker:
        accelerator.init_trackers("tracker", config=None)
    progress = tqdm(
        total=total_steps,
        initial=state["step"],
        desc="distilling",
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    first_step = 0
    with StopSignal() as stop:
        for name, stage in recipe.stages.items():
            if state["step"] < first_step + stage.steps and stop.number is None:
                state = _run_stage(
                    name, stage, first_step, recipe, accelerator, student, optimizer, teachers, state, progress, stop
                )
            first_step += stage.steps
    progress.close()
    if recipe.tracker:
        accelerator.end_training()
    skipped = skipped_images(state)
    if skipped:
        accelerator.print(f"images skipped so far: {json.dumps(skipped)}")
    if state["step"] < total_steps:
        accelerator.print(f"stopped by a signal at step {state['step']}; run the same command again to go on")
        return TrainResult(None, state["step"], skipped, stop.number)
    student_dir = publish_student(accelerator, student, output_dir)
    accelerator.print(f"the student is in {student_dir}")
    return TrainResult(student_dir, state["step"], skipped)


def _run_stage(
    stage_name: str,
    stage: StageRecipe,
    first_step: int,
    recipe: Recipe,
    accelerator: Accelerator,
    student: Any,
    optimizer: Any,
    teachers: dict[str, Teacher],
    state: dict[str, Any],
    progress: tqdm,
    stop: "StopSignal",
) -> dict[str, Any]:
    """Runs one stage to its end or to a signal, and returns the state to go on from."""
    names = stage.teachers or list(teachers)
    teachers = {name: teachers[name] for name in names}
    images_per_pass, accumulation = micro_batch(stage, accelerator.num_processes)
    accelerator.gradient_accumulation_steps = accumulation
    accelerator.step = 0  # Accelerate counts passes over all stages; a stage begins with an empty gradient
    stream = ImageStream(
        recipe.data,
        resolutions=sorted({stage.resolution, *(teacher.image_size for teacher in teachers.values())}),
        batch_size=images_per_pass,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    schedule = start_schedule(optimizer.optimizer, stage, recipe.optimizer.learning_rate)
    if state["stream"] is not None:  # the next stage goes on with the images that the last one has not seen
        stream.load_state_dict(state["stream"])
    if state["stage"] == stage_name:
        schedule.load_state_dict(state["schedule"])
        # The schedule's constructor has set the rate of step 0.
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
    student.train()
    patch_size = accelerator.unwrap_model(student).patch_size
    student_grid = (stage.resolution // patch_size, stage.resolution // patch_size)

    batches = iter(stream)
    log = Log(accelerator, Path(recipe.output_dir) / "metrics.jsonl", recipe)
    step = state["step"]
    while step < first_step + stage.steps:
        for _ in range(accumulation):
            batch: Batch = next(batches)
            images = to_device(batch, accelerator.device)
            targets = teacher_targets(teachers, images)
            with accelerator.accumulate(student):
                with accelerator.autocast():
                    output = student(images[stage.resolution], adaptors=names)
                terms = distillation_losses(output, student_grid, targets, recipe.loss)
                raise_if_not_finite(terms, step + 1)
                loss = weighted_sum(terms, recipe.teachers)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad_norm = accelerator.clip_grad_norm_(student.parameters(), recipe.optimizer.max_grad_norm)
                    if recipe.mixed_precision != "fp16":  # there the scaler expects overflows and skips the step
                        raise_if_not_finite({"gradient norm": torch.as_tensor(grad_norm)}, step + 1)
                optimizer.step()
                optimizer.zero_grad()
            log.add({"loss": loss, **terms}, images=images_per_pass * accelerator.num_processes)
        if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler found an overflow
            schedule.step()
        step += 1
        progress.update()
        last = step == first_step + stage.steps
        if step % recipe.log_every_steps == 0 or last:
            log.write(step, stage_name, float(schedule.get_last_lr()[0]), grad_norm, batch.skipped, progress)
        stopped = stop.agreed(accelerator)
        if step % recipe.checkpoints.every_steps == 0 or last or stopped:
            state = {"step": step, "stage": stage_name, "schedule": schedule.state_dict()}
            state = save_checkpoint(
                accelerator, student, Path(recipe.output_dir), recipe.checkpoints.keep, state, stream.state_dict()
            )
        if stopped:
            break
    return state


def to_device(batch: Batch, device: torch.device) -> dict[int, torch.Tensor]:
    """uint8 travels to the device, float in [0, 1] is made there: side -> (B, 3, side, side)."""
    return {
        side: pixels.to(device, non_blocking=True).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        for side, pixels in batch.images.items()
    }


class Log:
    """Means over a log interval, to metrics.jsonl, the tracker and the progress bar."""

    def __init__(self, accelerator: Accelerator, path: Path, recipe: Recipe):
        self.accelerator, self.path, self.recipe = accelerator, path, recipe
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self.passes = self.images = 0
        self.started = time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor], images: int) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value.detach()
        self.passes += 1
        self.images += images

    def write(
        self, step: int, stage: str, learning_rate: float, grad_norm: Any, skipped: dict[str, int], progress: tqdm
    ) -> None:
        now = time.perf_counter()
        means = torch.stack([torch.as_tensor(value) for value in self.sums.values()]) / self.passes
        means = self.accelerator.reduce(means, "mean")
        skipped_here = torch.tensor(sum(skipped.values()), device=self.accelerator.device)
        values = dict(zip(self.sums, means.tolist(), strict=True))
        values |= {
            "lr": learning_rate,
            "grad_norm": float(grad_norm),
            "images_per_second": self.images / (now - self.started),
            "skipped": int(self.accelerator.reduce(skipped_here, "sum")),
        }
        if self.accelerator.is_main_process:
            line = {"step": step, "stage": stage, **values}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            heads = " ".join(f"{name}={values[name]:.3f}" for name in values if "/" in name)
            progress.set_postfix_str(f"{values['images_per_second']:.0f} images/s loss={values['loss']:.3f} {heads}")
        if self.recipe.tracker:
            self.accelerator.log(values, step=step)
        self._reset()
        self.started = now  # the time that logging takes counts as training


class StopSignal:
    """Remembers the first Ctrl-C or SIGTERM, so that the step in hand ends and is saved; a second one is immediate."""

    def __init__(self) -> None:
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
        self.number = number
        self.__exit__()

    def agreed(self, accelerator: Accelerator) -> bool:
        """True on every process as soon as one has been told to stop: all must save the same step."""
        if accelerator.num_processes == 1:
            return self.number is not None
        told = torch.tensor([self.number or 0], device=accelerator.device)
        number = int(accelerator.gather(told).max())
        self.number = number or None
        return self.number is not None


def _accelerator(recipe: Recipe) -> Accelerator:
    # Heads of teachers that a stage leaves out, or that a checkpoint brings and nothing trains, get no gradient.
    unused = recipe.student.checkpoint is not None or any(stage.teachers for stage in recipe.stages.values())
    return Accelerator(
        mixed_precision=recipe.mixed_precision,
        log_with=recipe.tracker,
        project_dir=recipe.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
    )


def _on_main_process(accelerator: Accelerator, function: Any) -> Any:
    """The main process's result or error, on every process."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except (OSError, ValueError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
