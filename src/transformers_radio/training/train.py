"""The training loop: one Accelerate process group, one student, frozen teachers, streamed images."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from transformers_radio.data import keep_files, list_files
from transformers_radio.training.run.checkpoint import check_teachers, describe_teachers
from transformers_radio.training.run.export import publish_student
from transformers_radio.training.run.folder import find_run, open_run, truncate_metrics
from transformers_radio.training.run.processes import (
    build_accelerator,
    on_main_process,
    settle_precision,
    threads_beside_workers,
)
from transformers_radio.training.run.signals import STEPS_PER_AGREEMENT, StopSignal
from transformers_radio.training.run.state import Run, TrainingState

from .checks import check_before_training
from .groups import stage_groups
from .recipe import Recipe, expand_paths, validate
from .stage import Stage
from .student import build_student
from .teachers import build_teachers, gather_shapes, open_caches


@dataclass
class TrainResult:
    """What a run leaves. `student_dir` is None when a signal stopped it before the end (`signal` says which)."""

    student_dir: Path | None
    step: int
    skipped: dict[str, int] = field(default_factory=dict)  # images left out so far, by reason
    signal: int | None = None


def train(recipe: Recipe) -> TrainResult:
    """Distills the recipe's teachers into its student; resumes what an earlier start left unfinished.

    Called by every process of the group. A run that was killed at any moment and started again ends, on a CPU with
    the same number of threads, with bit-identical weights.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before the first step, naming the field and the fix.
        FloatingPointError: a loss is NaN or infinite; the last good checkpoint is kept.
        OSError: a checkpoint could not be written; the last good one is kept.
    """
    recipe = expand_paths(recipe)
    validate(recipe)  # it may have been made or changed in Python
    recipe = settle_precision(recipe)
    accelerator = build_accelerator(recipe)
    # Only the main process touches the folder; the others are told what it found.
    finished, checkpoint = on_main_process(accelerator, lambda: find_run(recipe))
    if finished:
        student_dir = Path(recipe.output_dir) / "student"
        accelerator.print(f"{student_dir} is trained already; overwrite=true or another output_dir trains anew")
        return TrainResult(student_dir, sum(stage.steps for stage in recipe.stages.values()))
    # The other processes do not list the images either: on a server or a shared disk that takes minutes.
    with keep_files(on_main_process(accelerator, lambda: list_files(recipe.data))):
        run = prepare(recipe, accelerator, checkpoint)
        with own_folder(run), StopSignal() as stop:
            for name in recipe.stages:
                if run.state.step < run.last_step(name) and stop.number is None:
                    train_stage(run, name, stop)
                    accelerator.free_memory()
            return finish(run, stop.number)


def train_stage(run: Run, name: str, stop: StopSignal) -> None:
    """Trains one stage to its end or to a signal, from its first step or the run's checkpoint."""
    recipe, accelerator, state = run.recipe, run.accelerator, run.state
    stage = Stage(run, name)
    stopped = False
    while state.step < stage.last_step and not stopped:
        stage.train_step()
        if stage.is_due(recipe.log_every_steps):
            stage.write_log()
        is_saved = stage.is_due(recipe.checkpoints.every_steps)
        # Several processes have to wait for each other to agree: they do so every few steps.
        asks = is_saved or accelerator.num_processes == 1 or state.step % STEPS_PER_AGREEMENT == 0
        stopped = asks and stop.agreed(accelerator)
        if is_saved or stopped:
            stage.save()
    stage.close()


def prepare(recipe: Recipe, accelerator: Accelerator, checkpoint: Path | None) -> Run:
    """Builds and checks everything before the first step. Nothing in output_dir changes.

    Args:
        checkpoint: to resume from; None for a new run.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    groups = {
        name: stage_groups(name, stage, list(recipe.teachers), rank, world_size)
        for name, stage in recipe.stages.items()
    }
    teachers = build_teachers(recipe, groups, accelerator.device)
    shapes = gather_shapes(accelerator, recipe, teachers)
    if checkpoint is not None:
        on_main_process(accelerator, lambda: check_teachers(checkpoint, describe_teachers(recipe, shapes)))
    set_seed(recipe.seed)  # the same initial student on every process
    student = build_student(recipe, shapes)
    check_before_training(recipe, student, teachers, groups, accelerator)
    caches = open_caches(accelerator, recipe, student, teachers, groups, shapes)
    state = TrainingState() if checkpoint is None else TrainingState.read(checkpoint)
    return Run(recipe, accelerator, student, teachers, shapes, groups, caches, state)


@contextmanager
def own_folder(run: Run) -> Iterator[None]:
    """Takes output_dir for this process group while the block runs; the logs continue from the run's step."""
    recipe, accelerator, step = run.recipe, run.accelerator, run.state.step
    served = [sum(group.index is not None for group in groups) for groups in run.groups.values()]
    with (
        threads_beside_workers(recipe.data.num_workers * max(served), accelerator.device),
        nullcontext() if run.caches is None else closing(run.caches),
        open_run(recipe, run.checkpoint) if accelerator.is_main_process else nullcontext(),
    ):
        accelerator.wait_for_everyone()
        if step:
            accelerator.print(f"continuing {run.output_dir} from step {step} of {run.total_steps}")
        if accelerator.is_main_process:
            truncate_metrics(run.output_dir / "metrics.jsonl", step)
        if recipe.tracker:
            # TensorBoard drops what a killed run logged after the checkpoint.
            purge = {"tensorboard": {"purge_step": step + 1}} if step else {}
            accelerator.init_trackers("tracker", config=None, init_kwargs=purge)
        run.progress = tqdm(
            total=run.total_steps,
            initial=step,
            desc="distilling",
            unit="step",
            disable=not accelerator.is_main_process,
            dynamic_ncols=True,
        )
        yield


def finish(run: Run, signal: int | None) -> TrainResult:
    """Publishes the student of the last checkpoint, unless a signal has stopped the run."""
    recipe, accelerator, state = run.recipe, run.accelerator, run.state
    run.progress.close()
    for tracker in accelerator.trackers:  # end_training would also end the process group, which is needed below
        tracker.finish()
    skipped = state.skipped_images()
    if skipped:
        accelerator.print(f"images skipped so far: {json.dumps(skipped)}")
    if state.step < run.total_steps:
        accelerator.print(f"stopped by a signal at step {state.step}; run the same command again to resume")
        return TrainResult(None, state.step, skipped, signal)
    checkpoint = run.checkpoint
    assert checkpoint is not None  # the last step saves one
    teachers = describe_teachers(recipe, run.shapes)
    student_dir = on_main_process(accelerator, lambda: publish_student(checkpoint, recipe, teachers))
    accelerator.print(f"the student is in {student_dir}")
    return TrainResult(student_dir, state.step, skipped)
