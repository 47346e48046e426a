"""The training loop: one Accelerate process group, one student, frozen teachers, streamed images."""

import json
import logging
import zlib
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from transformers_radio.data import ImageStream, keep_files, list_files
from transformers_radio.modeling import RadioModel
from transformers_radio.teachers import Teacher, TeacherOutput
from transformers_radio.training.phi_s.statistics import standardize_teachers
from transformers_radio.training.run.checkpoint import (
    check_teachers,
    describe_teachers,
    load_training,
    load_weights,
    read_state,
    save_checkpoint,
    skipped_images,
)
from transformers_radio.training.run.export import publish_student
from transformers_radio.training.run.folder import find_run, open_run, truncate_metrics
from transformers_radio.training.run.log import STEPS_PER_AGREEMENT, FiniteCheck, Log, StopSignal, TermSums, to_device
from transformers_radio.training.run.processes import (
    build_accelerator,
    on_main_process,
    settle_precision,
    threads_beside_workers,
)
from transformers_radio.training.stability.ema import EMA
from transformers_radio.training.stability.spectral import power_steps

from .balancing import AdaLossBalancing
from .cache import TeacherCaches
from .checks import check_before_training
from .distill import build_distillation, teacher_targets, term_weights
from .groups import Group, passes_in_step, stage_groups
from .optimizer import build_optimizer, start_schedule
from .recipe import Recipe, expand_paths, validate
from .student import TeacherShape, build_student
from .teachers import build_teachers, gather_shapes, open_caches

logger = logging.getLogger(__name__)


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
        OSError: a checkpoint could not be written; the last good one is kept.
    """
    recipe = expand_paths(recipe)
    validate(recipe)  # it may have been made or changed in Python
    output_dir = Path(recipe.output_dir)
    recipe = settle_precision(recipe)
    accelerator = build_accelerator(recipe)
    # Only the main process touches the folder; the others are told what it found.
    finished, resume_from = on_main_process(accelerator, lambda: find_run(recipe))
    student_dir = output_dir / "student"
    if finished:
        accelerator.print(f"{student_dir} is finished; choose another output_dir, or set overwrite=true to start over")
        return TrainResult(student_dir, sum(stage.steps for stage in recipe.stages.values()))
    # Nor does anyone else list the images: a server or a shared disk with many files takes minutes for it.
    with keep_files(on_main_process(accelerator, lambda: list_files(recipe.data))):
        return _prepare(recipe, accelerator, resume_from)


def _prepare(recipe: Recipe, accelerator: Accelerator, resume_from: Path | None) -> TrainResult:
    """Builds and checks everything before the first step, and runs the stages."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    groups = {
        name: stage_groups(name, stage, list(recipe.teachers), rank, world_size)
        for name, stage in recipe.stages.items()
    }
    teachers = build_teachers(recipe, groups, accelerator.device)  # those that this process serves
    shapes = gather_shapes(accelerator, recipe, teachers)  # of all
    if resume_from is not None:
        on_main_process(accelerator, lambda: check_teachers(resume_from, describe_teachers(recipe, shapes)))
    set_seed(recipe.seed)  # the same initial student on every process
    student = build_student(recipe, shapes)
    check_before_training(recipe, student, teachers, groups, accelerator)
    caches = open_caches(accelerator, recipe, student, teachers, groups, shapes)
    readers = recipe.data.num_workers * max(
        sum(group.index is not None for group in of_stage) for of_stage in groups.values()
    )
    # Nothing in output_dir has changed so far; from here on this process group owns it.
    with (
        threads_beside_workers(readers, accelerator.device),
        nullcontext() if caches is None else closing(caches),
        open_run(recipe, resume_from) if accelerator.is_main_process else nullcontext(),
    ):
        accelerator.wait_for_everyone()
        return _distil(recipe, accelerator, student, teachers, shapes, groups, caches, resume_from)


def _distil(
    recipe: Recipe,
    accelerator: Accelerator,
    student: RadioModel,
    teachers: dict[str, Teacher],
    shapes: dict[str, TeacherShape],
    groups: dict[str, list[Group]],
    caches: TeacherCaches | None,
    checkpoint: Path | None,
) -> TrainResult:
    """Runs the stages from the checkpoint on, and publishes the student at the end."""
    output_dir = Path(recipe.output_dir)
    total_steps = sum(stage.steps for stage in recipe.stages.values())
    state: dict[str, Any] = {"step": 0, "stage": None, "streams": {}, "statistics": {}}
    if checkpoint is not None:
        state = read_state(checkpoint)
        accelerator.print(f"continuing {output_dir} from step {state['step']} of {total_steps}")
    state["teachers"] = describe_teachers(recipe, shapes)
    if accelerator.is_main_process:
        truncate_metrics(output_dir / "metrics.jsonl", state["step"])
    if recipe.tracker:
        # TensorBoard drops what a killed run logged after the checkpoint.
        purge = {"tensorboard": {"purge_step": state["step"] + 1}} if state["step"] else {}
        accelerator.init_trackers("tracker", config=None, init_kwargs=purge)
    progress = tqdm(
        total=total_steps,
        initial=state["step"],
        desc="distilling",
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    first_step = 0
    met: list[Group] = []  # of this stage and those before it, whose heads the student keeps
    with StopSignal() as stop:
        for name, stage in recipe.stages.items():
            met += groups[name]
            if state["step"] < first_step + stage.steps and stop.number is None:
                known = state.get("statistics")
                standardize, known = standardize_teachers(recipe, accelerator, met, teachers, shapes, known)
                state = {**state, "statistics": known}
                to_come = list(recipe.stages)[list(recipe.stages).index(name) :]
                needed = {teacher for one in to_come for group in groups[one] for teacher in group.teachers}
                for teacher in teachers.keys() - needed:
                    del teachers[teacher]  # no stage from here on asks it: its memory is free for the others
                state = _run_stage(
                    recipe, name, first_step, accelerator, student, teachers, groups[name], standardize, caches, state,
                    progress, stop,
                )  # fmt: skip
                accelerator.free_memory()
            first_step += stage.steps
    progress.close()
    for tracker in accelerator.trackers:  # end_training would end the processes' group too, which is needed below
        tracker.finish()
    skipped = skipped_images(state)
    if skipped:
        accelerator.print(f"images skipped so far: {json.dumps(skipped)}")
    if state["step"] < total_steps:
        accelerator.print(f"stopped by a signal at step {state['step']}; run the same command again to go on")
        return TrainResult(None, state["step"], skipped, stop.number)
    # The last step's checkpoint holds the student as others load it.
    last = output_dir / "checkpoints" / f"step-{total_steps:08d}"
    student_dir = on_main_process(accelerator, lambda: publish_student(last, output_dir))
    accelerator.print(f"the student is in {student_dir}")
    return TrainResult(student_dir, total_steps, skipped)


def _run_stage(
    recipe: Recipe,
    stage_name: str,
    first_step: int,
    accelerator: Accelerator,
    full_student: RadioModel,
    teachers: dict[str, Teacher],
    groups: list[Group],
    standardize: dict[str, Any],
    caches: TeacherCaches | None,
    state: dict[str, Any],
    progress: tqdm,
    stop: StopSignal,
) -> dict[str, Any]:
    """Runs one stage to its end or to a signal, and returns the state to go on from."""
    stage, output_dir = recipe.stages[stage_name], Path(recipe.output_dir)
    checkpoint = output_dir / "checkpoints" / f"step-{state['step']:08d}" if state["step"] else None
    model = build_distillation(recipe, stage_name, full_student)
    terms = list(term_weights(recipe, model.student))
    resuming = state["stage"] == stage_name
    if checkpoint is not None:
        load_weights(checkpoint, model, same_stage=resuming)
    optimizer = build_optimizer(model, recipe, stage)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = start_schedule(optimizer.optimizer, stage)
    ema = EMA(accelerator.unwrap_model(model), recipe.ema_decay) if recipe.ema_decay else None
    # From here on every process draws its own position crops.
    set_seed(recipe.seed + first_step, device_specific=True)
    if checkpoint is not None and resuming:
        load_training(accelerator, checkpoint, model, optimizer.optimizer, ema, recipe.seed + state["step"])
        schedule.load_state_dict(state["schedule"])

    own = [group for group in groups if group.index is not None]
    streams = {
        group.name: open_stream(recipe, stage_name, group, teachers, state["streams"].get(group.name), resuming)
        for group in own
    }
    batches = {name: iter(stream) for name, stream in streams.items()}
    model.train()
    student = accelerator.unwrap_model(model).student
    balancing = accelerator.unwrap_model(model).balancing
    log = Log(accelerator, output_dir / "metrics.jsonl", recipe, terms)
    balanced = TermSums(terms, accelerator.device)
    finite = FiniteCheck([*terms, "gradient norm"], accelerator.device)

    step = state["step"]
    stopped = False
    while step < first_step + stage.steps and not stopped:
        stage_step = step - first_step
        passes = [group for group in own if group.takes_part(stage_step) for _ in range(group.passes)]
        # Gradients are reduced once, in the last pass, so that every process needs one. Sharded weights are gathered
        # in every pass: there all processes run equally many.
        most = max(passes_in_step(groups, rank, stage_step) for rank in range(accelerator.num_processes))
        idle = most - len(passes) if accelerator.is_fsdp2 else int(not passes)
        if recipe.student.spectral_reparam:
            power_steps(student)
        windows = {group.name: sample_window(recipe, student, group, step) for group in own}
        for number, group in enumerate([*passes, *[None] * idle], start=1):
            last = number == len(passes) + idle
            with nullcontext() if last else accelerator.no_sync(model):
                targets: dict[str, TeacherOutput] = {}
                weight, window = 0.0, None
                if group is None:
                    side = own[0].resolution
                    pixels = torch.zeros(1, 3, side, side, device=accelerator.device)
                else:
                    with log.waiting():
                        batch = next(batches[group.name])
                    images = to_device(batch, accelerator.device)
                    pixels, weight, window = images[group.resolution], group.image_weight, windows[group.name]
                    group_teachers = {name: teachers[name] for name in group.teachers}
                    targets = teacher_targets(group_teachers, images, standardize, batch.keys, caches)
                with accelerator.autocast():
                    totals, losses = model(pixels, targets, window_size=window)  # (B,), name -> (B,)
                loss = weight * totals.sum()
                # The processes' gradients are averaged, but their losses are parts of one sum.
                accelerator.backward(loss * accelerator.num_processes)
            log.loss += loss.detach()
            log.images += len(pixels) if losses else 0
            log.terms.add(losses)
            if isinstance(balancing, AdaLossBalancing):
                balanced.add(losses)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
        finite.check()
        finite.put(step + 1, log.terms.sums[0], grad_norm, scaled=accelerator.scaler is not None)
        optimizer.step()
        optimizer.zero_grad()
        if not accelerator.optimizer_step_was_skipped:  # fp16: the scaler found an overflow
            schedule.step()
            if ema is not None:
                ema.update()
        if isinstance(balancing, AdaLossBalancing):
            balancing.update(balanced.means(accelerator))
        step += 1
        log.steps += 1
        progress.update()
        at_end = step == first_step + stage.steps
        if step % recipe.log_every_steps == 0 or at_end:
            finite.check()
            skipped = sum(sum(stream.skipped.values()) for stream in streams.values())
            log.write(step, stage_name, float(max(schedule.get_last_lr())), grad_norm, skipped, progress)
        is_due = step % recipe.checkpoints.every_steps == 0 or at_end
        asks = accelerator.num_processes == 1 or is_due or step % STEPS_PER_AGREEMENT == 0
        stopped = asks and stop.agreed(accelerator)
        if is_due or stopped:
            finite.check()
            if caches is not None:  # before the checkpoint: what it has seen is on the disk
                caches.flush()
            state = {**state, "step": step, "stage": stage_name, "schedule": schedule.state_dict()}
            state = save_checkpoint(
                accelerator, model, optimizer.optimizer, ema, standardize, output_dir, recipe.checkpoints.keep, state,
                {name: stream.state_dict() for name, stream in streams.items()},
            )  # fmt: skip
    for stream in streams.values():
        stream.close()
    return state


def open_stream(
    recipe: Recipe,
    stage_name: str,
    group: Group,
    teachers: dict[str, Teacher],
    position: dict[str, Any] | None = None,
    same_stage: bool = True,
) -> ImageStream:
    """The images of one group on this process. Each group goes through the data in an order of its own.

    Args:
        position: of the group of this name, saved in this stage or in one before it.
        same_stage: in this one. Its batches then have to hold as many images as before, or they would be others.
    """
    stream = ImageStream(
        recipe.data,
        resolutions=sorted({group.resolution, *(teachers[name].image_size for name in group.teachers)}),
        batch_size=group.micro_batch_size,
        seed=recipe.seed + (0 if group.name == "all" else zlib.crc32(group.name.encode())),
        rank=group.index or 0,
        world_size=len(group.ranks),
    )
    if position is not None:  # also from the stage before: it goes on with the images that were not seen yet
        try:
            if same_stage and position["batch_size"] != group.micro_batch_size:
                where = f"stages.{stage_name}" + ("" if group.name == "all" else f".groups.{group.name}")
                before = position["batch_size"]
                raise ValueError(
                    f"{where} had {before} images in a pass of a process when its position in the data was saved, and "
                    f"has {group.micro_batch_size} now, which would change the order of the images: set "
                    f"{where}.micro_batch_size={before}, on a number of processes that divides "
                    f"{group.batch_size // before}."
                )
            stream.load_state_dict(position)
        except ValueError as error:
            if not recipe.restart_data:
                raise ValueError(
                    f"{error} Or set restart_data=true: the pass over the data then begins again"
                ) from error
            logger.warning("the pass over the data begins again, as restart_data is true: %s", error)
    return stream


def sample_window(recipe: Recipe, student: RadioModel, group: Group, step: int) -> int | None:
    """The attention window of a group's passes in a step: the same on all processes, as it decides the time of a pass.

    None: no windows are sampled, and the student's own default holds.
    """
    if not student.config.train_window_sizes:
        return None
    seed = zlib.crc32(f"{recipe.seed} {group.name} {step}".encode())
    generator = torch.Generator().manual_seed(seed)
    return student.sample_window_size(group.resolution, group.resolution, generator)
